package engine

// redoRecord is one change of table bytes.
type redoRecord struct {
	stage Stage
	file  int
	off   int64
	data  []byte
}
