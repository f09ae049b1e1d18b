package formattest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testRepair repairs what crashes leave: leaks are gone then, and nothing else is. (What
// repair makes of damage is a part of Hostile.)
func testRepair(t *testing.T, f Factory) {
	f.counted(t, "images repaired", func(f *Figures) *atomic.Int64 { return &f.Repairs })
	r := testenv.Rand(t)
	for range f.scaled(10) {
		if err := repairCrash(t, f, r); err != nil {
			t.Fatal(err)
		}
	}
}

func repairCrash(t *testing.T, f Factory, r *rand.Rand) error {
	t.Helper()
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, f.depths()[r.IntN(len(f.depths()))])
	p.play(t, f.script(r, mix{opWrite: 8, opZero: 2, opDiscard: 4, opFlush: 2}, 10+r.IntN(20)))
	left := p.rig.on(mem.Crash(r))
	p.mustClose(t)
	before, err := left.inspect()
	if err != nil {
		return err
	}
	for _, name := range left.names {
		if err := left.repair(name); err != nil {
			return fmt.Errorf("repair %s: %w", name, err)
		}
	}
	after, err := left.inspect()
	if err == nil && !bytes.Equal(before, after) {
		err = errors.New("after a repair it reads other bytes")
	}
	if err != nil {
		return err
	}
	left.checkWithQEMU(t, after, !f.RepairsLeaks)
	return nil
}

// repair repairs a layer of a chain that is not open, which must then have no faults. Kinds
// of images that cannot be repaired may say so: crashes leave leaks at most.
func (r *rig) repair(name string) error {
	if r.f.formatOf(name) != r.f.Format {
		return nil
	}
	layer, err := r.f.Format.Open(formats.OpenRequest{FS: r.fs, Name: name, Mode: vfs.ReadWrite, Secret: r.f.Secret})
	if err != nil {
		return err
	}
	_, err = engine.Check(context.Background(), layer, true, func(done, total int64) {})
	if closeErr := layer.Close(); closeErr != nil || err != nil && !errors.Is(err, block.ErrUnsupported) {
		return errors.Join(err, closeErr)
	}
	r.figures().Repairs.Add(1)
	return checkLayer(r.fs, r.f, name, !r.f.RepairsLeaks)
}
