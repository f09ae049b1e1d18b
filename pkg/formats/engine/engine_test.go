package engine

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func newFile(t *testing.T, fs vfs.FS, name string) vfs.File {
	t.Helper()
	f, err := fs.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestTables_WritesReachTheFileByStage(t *testing.T) {
	fs := vfs.NewMem()
	f := newFile(t, fs, "x")
	if err := f.Truncate(16 << 10); err != nil {
		t.Fatal(err)
	}
	l := NewLayer("x", "test", []vfs.File{f}, true)
	for _, w := range []struct {
		stage Stage
		off   int64
	}{{1, 0}, {0, 512}, {0, 1024}, {1, 4096 - 8}, {1, 4096}} {
		if err := l.Tables.Write(w.stage, 0, w.off, []byte{byte(w.off>>8) + 1, byte(w.stage) + 1}); err != nil {
			t.Fatal(err)
		}
	}
	l.Tables.letGo()
	c := newCommit(l)
	if got := len(c.Sectors()); got != 5 {
		t.Fatalf("%d changed sectors, want 5", got)
	}
	at := func(off int64) byte {
		var b [1]byte
		if _, err := f.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		return b[0]
	}
	if err := c.WriteTables(0); err != nil {
		t.Fatal(err)
	}
	if at(512) == 0 || at(1024) == 0 || at(0) != 0 || at(4096) != 0 {
		t.Fatalf("after stage 0: %d %d %d %d", at(512), at(1024), at(0), at(4096))
	}
	if err := c.WriteTables(1); err != nil {
		t.Fatal(err)
	}
	if at(0) == 0 || at(4096-8) == 0 || at(4096) == 0 {
		t.Fatal("stage 1 did not reach the file")
	}
}

func TestTables_EvictionKeepsChanges(t *testing.T) {
	fs := vfs.NewMem()
	f := newFile(t, fs, "x")
	if err := f.Truncate(8 << 20); err != nil {
		t.Fatal(err)
	}
	l := NewLayer("x", "test", []vfs.File{f}, true)
	l.Tables.maxPages = tableShards
	for off := int64(0); off < 8<<20; off += 64 << 10 {
		if err := l.Tables.Write(0, 0, off+10, []byte{byte(off >> 16), 7}); err != nil {
			t.Fatal(err)
		}
		l.Tables.letGo()
	}
	var got [2]byte
	for off := int64(0); off < 8<<20; off += 4096 {
		if err := l.Tables.Read(0, off+10, got[:]); err != nil {
			t.Fatal(err)
		}
		want := [2]byte{}
		if off%(64<<10) == 0 {
			want = [2]byte{byte(off >> 16), 7}
		}
		if got != want {
			t.Fatalf("at %d: %v, want %v", off, got, want)
		}
	}
}

func TestJournal_ReadsBackWhatWasNoted(t *testing.T) {
	fs := vfs.NewMem()
	file := &JournalFile{FS: fs, Name: "j", Epoch: 3}
	j, err := openJournal(file)
	if err != nil {
		t.Fatal(err)
	}
	id := []byte("image")
	j.start(id)
	note := func(off int64, s string) {
		j.add(redoRecord{stage: 2, file: 1, off: off, data: []byte(s)})
		if err := j.sync(); err != nil {
			t.Fatal(err)
		}
	}
	note(100, "one")
	j.rotate()
	note(200, "two")
	check := func(epoch int64, id string, want ...int64) {
		t.Helper()
		records, _, err := readJournal(&JournalFile{FS: fs, Name: "j", Epoch: epoch}, []byte(id))
		if err != nil {
			t.Fatal(err)
		}
		var got []int64
		for _, r := range records {
			got = append(got, r.off)
		}
		if len(got) != len(want) {
			t.Fatalf("records at %v, want %v", got, want)
		}
		for i := range want {
			if got[i] != want[i] || records[i].stage != 2 || records[i].file != 1 {
				t.Fatalf("records %+v, want %v", records, want)
			}
		}
	}
	check(3, "image", 100, 200)
	check(4, "image")
	check(3, "another")
	j.dropOld()
	check(3, "image", 200)
	j.rotate()
	j.dropOld()
	check(3, "image")
}

func FuzzParseSegment(f *testing.F) {
	fs := vfs.NewMem()
	j, err := openJournal(&JournalFile{FS: fs, Name: "j", Epoch: 1})
	if err != nil {
		f.Fatal(err)
	}
	j.start([]byte("id"))
	j.add(redoRecord{data: []byte("data"), off: 512})
	if err := j.sync(); err != nil {
		f.Fatal(err)
	}
	b := make([]byte, j.end)
	if _, err := j.segments[j.active].ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	if len(parseSegment(b, 1, []byte("id")).records) != 1 {
		f.Fatal("the seed does not parse")
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, r := range parseSegment(b, 1, []byte("id")).records {
			if r.off < 0 || len(r.data) > maxJournalRecord {
				t.Fatalf("record %+v", r)
			}
		}
	})
}

func TestSpace(t *testing.T) {
	fs := vfs.NewMem()
	f := newFile(t, fs, "x")
	if err := f.Truncate(1000); err != nil {
		t.Fatal(err)
	}
	s := NewSpace(f, 0, 1000, 512, 8192)
	p, err := s.Alloc(1024, 512)
	if err != nil || p.Off != 1024 || p.Len != 1024 || !p.Zeroed {
		t.Fatalf("Alloc = %+v, %v", p, err)
	}
	s.Free(1024, 512, false)
	if p, err = s.Alloc(1024, 512); err != nil || p.Off != 1024 || p.Len != 512 || p.Zeroed {
		t.Fatalf("Alloc after Free = %+v, %v; want the freed sector, not zeroed", p, err)
	}
	if p, err = s.Alloc(100<<10, 512); err != nil || p.Off+p.Len != 8192 {
		t.Fatalf("Alloc to the limit = %+v, %v", p, err)
	}
	if _, err = s.Alloc(512, 512); !errors.Is(err, block.ErrNoSpace) {
		t.Fatalf("Alloc past the limit: %v", err)
	}
	s.Free(p.Off, p.Len, true)
	if err := s.Trim(); err != nil {
		t.Fatal(err)
	}
	if size, _ := f.Size(); size != p.Off {
		t.Fatalf("trimmed to %d bytes, want %d", size, p.Off)
	}
}

func TestClaims_NeverTwoOwners(t *testing.T) {
	var c claims
	c.init()
	owners := make([]int32, 100)
	done := make(chan bool)
	for g := range 8 {
		go func() {
			defer func() { done <- true }()
			r := rand.New(rand.NewPCG(1, uint64(g)))
			for range 2000 {
				start := r.Int64N(90)
				end := start + 1 + r.Int64N(9)
				held := c.acquire(start, end)
				for i := start; i < end; i++ {
					owners[i]++ // the race detector objects if two own it
				}
				for i := start; i < end; i++ {
					if owners[i] != 1 {
						t.Errorf("%d has %d owners", i, owners[i])
					}
					owners[i]--
				}
				c.release(held)
			}
		}()
	}
	for range 8 {
		<-done
	}
}

func TestInflatedCache_IsBounded(t *testing.T) {
	var c inflatedCache
	l := &Layer{}
	for i := range int64(100) {
		want := bytes.Repeat([]byte{byte(i)}, 1<<20)
		got, err := c.get(inflatedKey{l, i << 20}, func() ([]byte, error) { return want, nil })
		if err != nil || !bytes.Equal(got, want) {
			t.Fatal("wrong granule")
		}
	}
	if c.bytes > maxInflatedBytes || len(c.kept) != len(c.order) {
		t.Fatalf("%d bytes in %d granules kept", c.bytes, len(c.kept))
	}
	c.dropRange(l, 0, 100<<20)
	if c.bytes != 0 || len(c.kept) != 0 {
		t.Fatalf("%d bytes in %d granules left", c.bytes, len(c.kept))
	}
}
