package formats

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Committing says how an overlay's contents are written into what it stands on.
type Committing struct {
	// Open says how to open the overlay.
	Open OpenOptions
	// Base is the image that is written, "" for the direct parent. The overlays between
	// the two are left as they are, and read differently from then on.
	Base string
	// Keep leaves the overlay as it is, because it is going to be dropped; otherwise it
	// is emptied. With another base than the direct parent it is always left.
	Keep bool
}

// Committed says what a Commit did.
type Committed struct {
	Base    string // name of the image that was written
	Emptied bool   // the overlay holds nothing any more
}

// Commit writes what an overlay holds into the image that it stands on. The overlay reads
// the same at any moment, also after a crash: what was written is durable before the overlay
// is emptied. Other overlays on the same image do not. A smaller base grows first; of a
// larger one, the end stays as it is. An overlay whose format keeps what was allocated once
// (VDI) is left as it is.
//
// Where links note the parent's identity, a crash just before the first write can leave an
// overlay that does not know its parent again: nothing is lost, see [Rebasing.Unsafe].
func Commit(ctx context.Context, fs vfs.FS, name string, m Committing, progress Progress) (done Committed, err error) {
	upper, err := m.openUpper(ctx, fs, name)
	if err != nil {
		return done, err
	}
	defer func() { err = errors.Join(err, upper.disk.Close()) }()
	done.Base = upper.link.Name
	lower, err := m.openBase(ctx, fs, upper.link)
	if err != nil {
		return done, err
	}
	err = m.writeDown(ctx, fs, upper, lower, progress)
	if err = errors.Join(err, lower.Close()); err == nil && upper.emptied {
		done.Emptied, err = upper.empty()
	}
	if err != nil {
		return done, fmt.Errorf("commit %s to %s: %w", name, done.Base, err)
	}
	return done, nil
}

// empty takes everything out of the overlay, if that can be done.
func (u upperPart) empty() (bool, error) {
	err := u.disk.Empty()
	if errors.Is(err, block.ErrUnsupported) {
		return false, u.disk.Flush()
	}
	return err == nil, errors.Join(err, u.disk.Flush())
}

// upperPart is what is written down: the layers above the base.
type upperPart struct {
	disk    *engine.Disk
	link    *engine.ParentLink // of its lowest layer, to the base
	child   *engine.Layer      // that layer
	emptied bool
}

// openUpper opens the layers above the base. The top one is opened for writing if it is to
// be emptied.
func (m Committing) openUpper(ctx context.Context, fs vfs.FS, name string) (upperPart, error) {
	opts := m.Open
	opts.Mode = vfs.ReadOnly
	if !m.Keep {
		opts.Mode = vfs.ReadWrite
	}
	layers, err := chain{fs: fs, opts: opts, until: func(link *engine.ParentLink) bool {
		return m.Base == "" || link.Name == m.Base
	}}.open(ctx, name)
	if err != nil {
		return upperPart{}, err
	}
	child := layers[len(layers)-1]
	if child.Parent == nil {
		err := fmt.Errorf("commit %s: %w: it stands on nothing", name, block.ErrInvalid)
		if m.Base != "" {
			err = fmt.Errorf("commit %s: %w: it does not stand on %s", name, block.ErrInvalid, m.Base)
		}
		return upperPart{}, errors.Join(err, closeLayers(layers))
	}
	disk, err := engine.New(layers, engine.Options{})
	if err != nil {
		return upperPart{}, errors.Join(err, closeLayers(layers))
	}
	return upperPart{disk: disk, link: child.Parent, child: child, emptied: !m.Keep && len(layers) == 1}, nil
}

func (m Committing) openBase(ctx context.Context, fs vfs.FS, link *engine.ParentLink) (*Image, error) {
	opts := m.Open
	opts.Format, opts.Mode = m.Open.formatOf(link), vfs.ReadWrite
	return Open(ctx, fs, link.Name, opts)
}

// writeDown writes what the upper layers hold into the lower image.
func (m Committing) writeDown(ctx context.Context, fs vfs.FS, upper upperPart, lower *Image, progress Progress) error {
	if err := verifyParent(upper.child, lower.Layers()[0]); err != nil {
		return fmt.Errorf("%w; if they do belong together, image rebase --unsafe links them anew", err)
	}
	size := upper.disk.Info().SizeBytes
	if size > lower.Info().SizeBytes {
		f, err := Lookup(lower.Layers()[0].Format)
		if err != nil {
			return err
		}
		if err := lower.Resize(RoundSize(f, size)); err != nil {
			return err
		}
	}
	if upper.emptied && upper.link.Verify != nil {
		if err := m.relink(fs, upper, lower); err != nil {
			return err
		}
	}
	c, err := Copying{Under: lower}.copier(lower, upper.disk, size)
	if err != nil {
		return err
	}
	c.held = true
	c.look = upper.disk.Map
	if upper.emptied { // relinking may have put a layer below
		c.look = func(off, n int64) (block.Extent, error) { return upper.disk.MapLayer(0, off, n) }
	}
	return c.run(ctx, progress)
}

// relink has the overlay accept its parent as it is from the first write on. Between the
// two, a crash leaves an overlay that has to be linked anew, with nothing lost.
func (m Committing) relink(fs vfs.FS, upper upperPart, lower *Image) error {
	if _, err := lower.Base(); err != nil {
		return err
	}
	// The disk wants layers of its own; this one is for its identity alone.
	opts := m.Open
	opts.NoLock = true
	now, err := openLayer(fs, upper.link.Name, lower.Layers()[0].Format, vfs.ReadOnly, opts)
	if err != nil {
		return err
	}
	if _, err := upper.disk.SetParent(&engine.Parent{Name: upper.link.Name, Layer: now}, []*engine.Layer{now}); err != nil {
		return errors.Join(err, now.Close())
	}
	return nil
}
