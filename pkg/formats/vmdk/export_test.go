package vmdk

// SetSplit lets images of several files have extents of so many sectors, until restore is
// called: crashes are swept over small images.
func SetSplit(sectors int64) (restore func()) {
	old := make([]kind, len(kinds))
	copy(old, kinds)
	for i := range kinds {
		if kinds[i].splitSectors > 0 {
			kinds[i].splitSectors = sectors
		}
	}
	return func() { copy(kinds, old) }
}
