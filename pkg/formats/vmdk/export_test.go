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

// SESparseJournal returns the sequence numbers of the transactions in an extent's journal.
func SESparseJournal(extent []byte) ([]uint64, error) {
	h, err := decodeSE(extent[:seHeaderBytes])
	if err != nil {
		return nil, err
	}
	all, err := decodeSEJournal(extent[h.journal.bytes():h.journal.end()*sectorBytes], &h)
	var sequences []uint64
	for _, t := range all {
		sequences = append(sequences, t.sequence)
	}
	return sequences, err
}

// SetSEMaxLeaving bounds how many grains of an seSparse extent can be taken back before they
// are free, until restore is called.
func SetSEMaxLeaving(n int) (restore func()) {
	old := seMaxLeaving
	seMaxLeaving = n
	return func() { seMaxLeaving = old }
}
