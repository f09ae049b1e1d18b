package qcow

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// A repair takes space only past the end of the file as it was: what looks free may be what
// a bad entry has lost, and where the file ended decides what entries are bad. It makes each
// copy durable before an entry names it, so that it can be interrupted and repeated.

// repairedEntry is what became of an entry.
type repairedEntry struct {
	done  bool
	entry uint64
	text  string
}

// repairEntry gives a cluster that shares its place with another one a copy of it, with which
// it reads as before. One whose entry leads nowhere reads as zeroes from then on: nothing can
// say what it held.
func (k *checker) repairEntry(cluster int64, entry uint64) (repairedEntry, error) {
	if !k.repairs() {
		return repairedEntry{}, nil
	}
	shares := false
	if entry&flagCompressed == 0 {
		_, shares = k.m.dataRoom(cluster, entry)
	}
	switch {
	case shares:
		off, err := k.copyOf(span{int64(entry), int64(entry) + k.m.clusterBytes()})
		return repairedEntry{true, uint64(off), "; it has got a copy"}, err
	case k.m.layer.Parent == nil:
		return repairedEntry{true, 0, "; now it reads as zeroes"}, nil
	}
	off, err := k.zeroCluster(cluster)
	return repairedEntry{true, uint64(off), "; now it reads as zeroes"}, err
}

// copyOf copies a plain cluster to a new place.
func (k *checker) copyOf(place span) (int64, error) {
	p := make([]byte, min(place.end, k.m.fileEnd)-place.start)
	if err := readFull(k.m.f, p, place.start); err != nil {
		return 0, err
	}
	return k.newCluster(append(p, make([]byte, k.m.clusterBytes()-int64(len(p)))...))
}

// zeroCluster makes a cluster of zeroes, which hides what a parent has.
func (k *checker) zeroCluster(cluster int64) (int64, error) {
	p := make([]byte, k.m.clusterBytes())
	if k.m.cipher != nil {
		k.m.cipher.Encrypt(p, cluster<<k.m.clusterShift)
	}
	return k.newCluster(p)
}

func (k *checker) newCluster(p []byte) (int64, error) {
	place, err := k.m.space.Alloc(k.m.clusterBytes(), k.m.clusterBytes())
	if err != nil {
		return 0, err
	}
	return place.Off, k.commit.WriteAt(0, p, place.Off)
}

// writeTable writes a level 2 table back, once what it refers to is durable.
func (k *checker) writeTable(at int64) error {
	defer k.m.tables.Forget()
	if err := k.commit.Sync(); err != nil {
		return err
	}
	if err := k.commit.WriteAt(0, k.table, at); err != nil {
		return err
	}
	return k.commit.Sync()
}

// repairL1 clears a bad level 1 entry, if its table cannot be in the file at all, so that
// nothing is lost, and no parent's data comes up.
func (k *checker) repairL1(ti int64) (fixed bool, err error) {
	m := k.m
	if !k.repairs() || m.layer.Parent != nil {
		return false, nil
	}
	var p [entryBytes]byte
	if err := m.tables.Read(0, m.l1EntryOff(ti), p[:]); err != nil {
		return false, err
	}
	at := binary.BigEndian.Uint64(p[:])
	if at < uint64(m.fileEnd) && uint64(m.tableBytes()) <= uint64(m.fileEnd)-at {
		return false, nil
	}
	m.l1[ti] = 0
	defer m.tables.Forget()
	clear(p[:])
	return true, k.commit.WriteAt(0, p[:], m.l1EntryOff(ti))
}

// reportStored reports compressed clusters that overlap others, by their keys, and gives them
// copies.
func (k *checker) reportStored(shared map[uint64]bool) error {
	return k.eachStored(func(cluster int64, key uint64, p []byte) (changed bool, err error) {
		if !shared[key] {
			return false, nil
		}
		place, text := k.placeOf(key), ""
		if k.repairs() {
			at, err := k.copyOfStored(place)
			if err != nil {
				return false, err
			}
			binary.BigEndian.PutUint64(p, k.m.compressedEntry(at, place.end-place.start))
			text = "; it has got a copy"
		}
		k.corrupt(k.repairs(), "cluster %d (guest offset %#x): its %d compressed bytes at %#x are also another cluster's%s",
			cluster, cluster<<k.m.clusterShift, place.end-place.start, place.start, text)
		return k.repairs(), nil
	})
}

func (k *checker) copyOfStored(place span) (int64, error) {
	p := make([]byte, place.end-place.start)
	if err := readFull(k.m.f, p, place.start); err != nil {
		return 0, err
	}
	if err := k.m.extendPacking(int64(len(p))); err != nil {
		return 0, err
	}
	at := k.m.packing.start
	k.m.packing.start += int64(len(p))
	return at, k.commit.WriteAt(0, p, at)
}

// cutOff shortens the file if whole clusters at its end are lost, and by what was reserved
// ahead for copies. In an image that was damaged, what looks lost may be all that is left of
// what a damaged entry led to: then it stays, until another repair.
func (k *checker) cutOff() error {
	m := k.m
	if k.damaged {
		return m.space.Trim()
	}
	end := m.wholeClusters(m.fileEnd)
	var tail span
	k.eachFree(func(free span) { tail = free })
	if tail.end < end || tail.start == tail.end {
		return k.punchLeaks()
	}
	lost := (tail.end - tail.start) >> m.clusterShift
	k.result.Leaks -= lost
	k.result.FixedLeaks += lost
	if err := k.commit.Truncate(0, tail.start); err != nil {
		return err
	}
	m.fileEnd = tail.start
	m.space = engine.NewSpace(m.f, 0, tail.start, m.clusterBytes(), m.maxFileBytes())
	return k.punchLeaks()
}

// punchLeaks gives the space of lost clusters within the file back to the file system. Their
// place stays lost, as far as the format goes.
func (k *checker) punchLeaks() error {
	var failed error
	k.eachFree(func(free span) {
		if free.end = min(free.end, k.m.fileEnd); free.start < free.end && failed == nil {
			failed = k.m.f.PunchHole(free.start, free.end-free.start)
		}
	})
	if failed != nil && !errors.Is(failed, errors.ErrUnsupported) {
		return fmt.Errorf("punch lost clusters of %s: %w", k.m.f.Name(), failed)
	}
	k.punched = failed == nil
	return k.m.space.Trim()
}
