package vhdx_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// TestCommit_SeveralRounds commits more than one log entry can hold, and loses power at
// every step: each sector is as it was, or as something made it since.
func TestCommit_SeveralRounds(t *testing.T) {
	for _, isChild := range []bool{false, true} {
		t.Run(fmt.Sprintf("differencing=%v", isChild), func(t *testing.T) {
			r := testenv.Rand(t)
			mem := vfs.NewMem()
			const size = 80 << 30
			mustCreate(t, mem, formats.CreateRequest{Name: "a.vhdx", SizeBytes: size, ClusterBytes: 1 << 20})
			if isChild {
				parent := mustOpen(t, mem, "a.vhdx", vfs.ReadOnly)
				mustCreate(t, mem, formats.CreateRequest{
					Name: "b.vhdx", ClusterBytes: 1 << 20, Parent: &formats.Parent{Name: "a.vhdx", Layer: parent.Layers()[0]},
				})
				parent.Close()
				if err := mem.Rename("b.vhdx", "child.vhdx"); err != nil {
					t.Fatal(err)
				}
			} else if err := mem.Rename("a.vhdx", "child.vhdx"); err != nil {
				t.Fatal(err)
			}
			if err := mem.SyncDir("."); err != nil {
				t.Fatal(err)
			}
			s := &scattered{r: r, mem: mem}
			s.fs = vfs.Inject(mem, vfs.If(vfs.Changing, s.hook))
			// A block in every page of the BAT: many more than an entry holds.
			for block := int64(0); block < size>>20; block += 512 + r.Int64N(8) {
				for _, sector := range []int64{0, 7, 2047} {
					s.places = append(s.places, &place{off: block<<20 + sector*512, durable: 0})
				}
			}
			s.image = mustOpen(t, s.fs, "child.vhdx", vfs.ReadWrite)
			s.change(t)
			s.flush(t)
			s.change(t)
			s.isWatched = true
			s.flush(t)
			s.isWatched = false
			if s.crashes < 10 {
				t.Errorf("%d crashes: everything fitted into one entry", s.crashes)
			}
			if err := s.image.Close(); err != nil {
				t.Fatal(err)
			}
			if err := s.look(mem.Crash(r)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// place is a sector: its bytes are all alike.
type place struct {
	off     int64
	durable byte
	since   []byte // what else it may be
}

// scattered is an image with places all over it.
type scattered struct {
	r         *rand.Rand
	mem       *vfs.Mem
	fs        vfs.FS
	image     *formats.Image
	places    []*place
	isWatched bool
	crashes   int
	wrong     error
}

// change writes to all places, and discards some of their blocks in between.
func (s *scattered) change(t *testing.T) {
	t.Helper()
	next := byte(1)
	for i, p := range s.places {
		if i%3 == 0 && s.r.IntN(2) == 0 {
			if err := s.image.WriteZeroes(p.off, 1<<20, 0); err != nil {
				t.Fatal(err)
			}
			for _, q := range s.places[i : i+3] {
				q.since = append(q.since, 0)
			}
		}
		if s.r.IntN(3) == 0 {
			continue
		}
		next = next%200 + 1
		b := make([]byte, 512)
		for j := range b {
			b[j] = next
		}
		if _, err := s.image.WriteAt(b, p.off); err != nil {
			t.Fatal(err)
		}
		p.since = append(p.since, next)
	}
}

func (s *scattered) flush(t *testing.T) {
	t.Helper()
	err := s.image.Flush()
	if err = errors.Join(err, s.wrong); err != nil {
		t.Fatal(err)
	}
	for _, p := range s.places {
		if n := len(p.since); n > 0 {
			p.durable, p.since = p.since[n-1], nil
		}
	}
}

func (s *scattered) hook(vfs.Op) error {
	if !s.isWatched || s.wrong != nil {
		return nil
	}
	s.isWatched = false
	defer func() { s.isWatched = true }()
	s.crashes++
	if err := s.look(s.mem.Crash(s.r)); err != nil {
		s.wrong = fmt.Errorf("crash %d: %w", s.crashes, err)
	}
	return nil
}

// look returns an error unless an image that a crash left is sound and holds what it may.
func (s *scattered) look(fsys vfs.FS) error {
	image, err := formats.Open(context.Background(), fsys, "child.vhdx", formats.OpenOptions{Format: "vhdx", Mode: vfs.ReadWrite})
	if err != nil {
		return err
	}
	defer image.Close()
	for _, p := range s.places {
		var b [512]byte
		if _, err := image.ReadAt(b[:], p.off); err != nil {
			return err
		}
		for _, c := range b {
			ok := c == p.durable
			for _, maybe := range p.since {
				ok = ok || c == maybe
			}
			if !ok {
				return fmt.Errorf("sector at %#x has %#x, want %#x or one of %#x", p.off, c, p.durable, p.since)
			}
		}
	}
	result, err := image.Layers()[0].Codec.Check(context.Background(), nil, nil)
	if err == nil && result.Corruptions > 0 {
		err = fmt.Errorf("check: %+v", result.Problems)
	}
	return err
}
