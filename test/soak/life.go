package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/load"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

const (
	volumeBytes = 48 << 20
	growBytes   = 8 << 20   // at once, at most
	mostBytes   = 128 << 20 // a volume grows to
	// lifetime is how long a volume lives, on average, before the next kind has its turn.
	lifetime = 40 * time.Second
	// workers and requestPause leave a small machine time for everything else.
	workers      = 3
	requestPause = 3 * time.Millisecond
	// eventPause is between two things that happen to a volume, on average.
	eventPause = 1500 * time.Millisecond
	// hang is how long a server is stopped at most.
	hang = 4 * time.Second
)

// life is a volume's.
type life struct {
	*soak
	rng       *rand.Rand
	kind      kind
	volume    *node.Volume
	model     *load.Model
	run       *load.Run // nil while nothing runs
	snapshots int
	noGrow    bool // the format can't
	noSnap    bool
}

// live lets one volume live until over ends or its time has come. What it has to do for
// its end it does with ctx.
func (s *soak) live(ctx, over context.Context, rng *rand.Rand) {
	k, name := s.nextKind()
	l := &life{soak: s, rng: rng, kind: k}
	err := l.be(ctx, over, name)
	if l.run != nil {
		err = errors.Join(err, l.run.Stop())
	}
	if l.model != nil {
		s.tally.addLoad(k, l.model.Counts())
	}
	if ctx.Err() != nil {
		return // interrupted
	}
	s.failed(name, err)
}

func (l *life) be(ctx, over context.Context, name string) error {
	if err := l.birth(ctx, name); err != nil {
		return err
	}
	end := time.After(lifetime/2 + time.Duration(l.rng.Int64N(int64(lifetime))))
	for {
		select {
		case <-over.Done():
			return l.death(ctx)
		case <-end:
			return l.death(ctx)
		case <-l.run.Failed():
			return l.stop()
		case <-time.After(time.Duration(l.rng.Int64N(int64(2 * eventPause)))):
		}
		if err := l.happen(ctx); err != nil {
			return err
		}
	}
}

func (l *life) birth(ctx context.Context, name string) error {
	var err error
	l.volume, err = l.node.Create(ctx, name, volumeBytes, map[string]string{"format": l.kind.format, "transport": l.kind.transport})
	if err != nil {
		return err
	}
	l.tally.add(eventVolume)
	l.model = load.New(l.volume.SizeBytes, l.rng, load.Options{Workers: workers, Pause: requestPause, ID: l.rng.Uint32()})
	return l.attach(ctx)
}

// attach attaches the volume and starts its load.
func (l *life) attach(ctx context.Context) error {
	if err := l.volume.Attach(ctx); err != nil {
		return err
	}
	l.tally.add(eventAttach)
	var err error
	l.run, err = l.model.Start(l.volume.Path())
	return err
}

// stop stops the load.
func (l *life) stop() error {
	run := l.run
	l.run = nil
	return run.Stop()
}

// detach stops the load, compares everything, and detaches the volume.
func (l *life) detach(ctx context.Context) error {
	if err := l.stop(); err != nil {
		return err
	}
	if err := l.verify(l.volume, l.model); err != nil {
		return err
	}
	if err := l.volume.Detach(ctx); err != nil {
		return err
	}
	l.tally.add(eventDetach)
	return nil
}

// verifier is a model, or a cut of one.
type verifier interface{ Verify(path string) error }

func (l *life) verify(v *node.Volume, model verifier) error {
	if err := model.Verify(v.Path()); err != nil {
		return fmt.Errorf("verify %s: %w", v.ID, err)
	}
	l.tally.add(eventVerify)
	return nil
}

// death looks at the volume once more after a detach, and deletes it.
func (l *life) death(ctx context.Context) error {
	if err := l.detach(ctx); err != nil {
		return err
	}
	if err := l.volume.Attach(ctx); err != nil {
		return err
	}
	l.tally.add(eventAttach)
	if err := l.verify(l.volume, l.model); err != nil {
		return err
	}
	if err := l.volume.Detach(ctx); err != nil {
		return err
	}
	l.tally.add(eventDetach)
	return l.volume.Delete(ctx)
}

// happen lets something happen to the volume.
func (l *life) happen(ctx context.Context) error {
	switch p := l.rng.IntN(100); {
	case p < 40:
		l.tally.addN(eventKillServer, l.volume.KillServer())
		return nil
	case p < 50:
		l.tally.addN(eventHang, l.volume.HangServer(ctx, time.Duration(l.rng.Int64N(int64(hang)))))
		return nil
	case p < 65:
		return l.grow(ctx)
	case p < 85:
		return l.snapshot(ctx)
	default:
		if err := l.detach(ctx); err != nil {
			return err
		}
		return l.attach(ctx)
	}
}

func (l *life) grow(ctx context.Context) error {
	size := l.volume.SizeBytes + (1+l.rng.Int64N(growBytes/load.BlockBytes))*load.BlockBytes
	if l.noGrow || size > mostBytes {
		return nil
	}
	grow := l.volume.Grow
	if l.kind.transport == "ublk" {
		grow = l.growDetached // before Linux 6.16 its devices keep their size
	}
	err := grow(ctx, size)
	if cannot(err) {
		l.noGrow = true
		l.tally.add(eventNoGrow)
		return nil
	}
	if err != nil {
		return err
	}
	l.model.Grow(l.volume.SizeBytes)
	l.tally.add(eventGrow)
	return nil
}

// growDetached grows the volume between a detach and an attach.
func (l *life) growDetached(ctx context.Context, size int64) error {
	if err := l.detach(ctx); err != nil {
		return err
	}
	err := l.volume.GrowDetached(ctx, size)
	if attached := l.attach(ctx); attached != nil {
		return attached
	}
	return err
}

// snapshot takes a snapshot while the volume is being written, and sometimes looks
// whether it holds what the volume held at one moment.
func (l *life) snapshot(ctx context.Context) error {
	if l.noSnap {
		return nil
	}
	l.snapshots++
	name := fmt.Sprintf("%s-s%d", strings.ReplaceAll(l.volume.ID, "/", "-"), l.snapshots)
	cut := l.model.BeginCut()
	id, err := l.volume.Snapshot(ctx, name)
	cut.End()
	if cannot(err) {
		l.noSnap = true
		l.tally.add(eventNoSnapshot)
		return nil
	}
	if err != nil {
		return err
	}
	l.tally.add(eventSnapshot)
	if l.rng.IntN(2) == 0 {
		if err := l.restore(ctx, name, id, cut); err != nil {
			return err
		}
	}
	if err := l.volume.DeleteSnapshot(ctx, id); err != nil {
		return err
	}
	l.tally.add(eventDropSnapshot)
	return nil
}

// restore makes a volume of a snapshot, and compares.
func (l *life) restore(ctx context.Context, name, id string, cut *load.Cut) error {
	restored, err := l.volume.Restore(ctx, name+"-r", id)
	if err != nil {
		return err
	}
	if err := restored.Attach(ctx); err != nil {
		return err
	}
	if err := l.verify(restored, cut); err != nil {
		return err
	}
	if err := restored.Detach(ctx); err != nil {
		return err
	}
	l.tally.add(eventRestore)
	return restored.Delete(ctx)
}

// cannot says whether a call was refused because of the volume's format or transport.
func cannot(err error) bool { return err != nil && strings.Contains(err.Error(), "(Unimplemented)") }
