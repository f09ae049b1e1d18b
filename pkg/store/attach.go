package store

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// AttachOptions say how a volume is opened.
type AttachOptions struct {
	// Node and Epoch are those of the publication that allows it. With Node "" the
	// volume must not be published at all (local use); such a use is known to others
	// by its locks only, so it must not have a Journal.
	Node  string
	Epoch int64
	// ReadOnly opens for reading; any number can at once.
	ReadOnly bool
	// Snapshot opens a snapshot of the volume, read-only, published or not.
	Snapshot string
	// Journal is the absolute host path of the redo journal, on tmpfs; "" is none.
	// Files of that name with suffixes are made, and removed by a clean Close.
	Journal string
}

// Attached is a volume opened by Attach. It is a block.Device, which fails with
// ErrFenced once the volume is lost.
type Attached struct {
	store *Store
	name  string
	opts  AttachOptions

	image   *formats.Image
	journal vfs.FS // that the journal lies in; nil without
	fence   fence
	use     use
	marked  bool // this attachment is the one that set Serving
	// gate is held exclusively while the top layer is being switched, so that what is
	// recorded as the snapshot's contents is what they are. Lock order: the volume's
	// lock, then gate.
	gate sync.RWMutex

	mu     sync.Mutex
	record Record // as last seen

	merging     sync.Mutex  // held by a live merge
	nextMerge   time.Time   // not before; belongs to watch
	cannotMerge atomic.Bool // the top's format cannot change its parent

	lost     chan error
	stop     context.CancelFunc
	watching sync.WaitGroup
	close    sync.Once
	closeErr error
}

var _ block.Device = (*Attached)(nil)

// Attach opens a volume, for the process that serves it. It waits for a previous holder
// to go, a bounded time (ErrLocked), finishes what a dead one left, and from then on
// carries out the wishes in the record. ErrFenced: the publication is not, or no longer,
// the node's.
func (s *Store) Attach(ctx context.Context, name string, opts AttachOptions) (*Attached, error) {
	if err := opts.validate(name); err != nil {
		return nil, fmt.Errorf("attach volume %s: %w", name, err)
	}
	a := &Attached{store: s, name: name, opts: opts, lost: make(chan error, 1), use: newUse()}
	err := retryLocked(ctx, s.opts.HolderWait, func() error { return a.open(ctx) })
	if err != nil {
		if a.marked {
			err = errors.Join(err, a.stopServing())
		}
		return nil, fmt.Errorf("attach volume %s: %w", name, errors.Join(err, a.closeJournal()))
	}
	watchCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	a.stop = stop
	if opts.Snapshot == "" && !s.opts.ReadOnly {
		a.watching.Go(func() { a.watch(watchCtx) })
	}
	return a, nil
}

func (o AttachOptions) validate(name string) error {
	if err := checkVolumeName(name); err != nil {
		return err
	}
	switch {
	case o.Snapshot != "" && !o.ReadOnly:
		return fmt.Errorf("snapshot %s: %w: snapshots can only be read", o.Snapshot, block.ErrReadOnly)
	case o.Journal != "" && !filepath.IsAbs(o.Journal):
		return fmt.Errorf("journal %q: %w: want an absolute path", o.Journal, block.ErrInvalid)
	case o.Journal != "" && o.Node == "":
		return fmt.Errorf("journal %q: %w: a volume used locally cannot have one", o.Journal, block.ErrInvalid)
	}
	return nil
}

// open opens the volume once; ErrLocked says that somebody else still has it.
func (a *Attached) open(ctx context.Context) error {
	switch {
	case a.opts.Snapshot != "":
		return a.openSnapshot(ctx)
	case a.opts.ReadOnly:
		return a.openReadOnly(ctx)
	}
	if err := a.store.writable(); err != nil {
		return err
	}
	return a.openWritable(ctx)
}

func (a *Attached) openSnapshot(ctx context.Context) error {
	rec, err := a.store.readRecord(a.name)
	if err != nil {
		return notFound(a.name, err)
	}
	snap := rec.snapshot(a.opts.Snapshot)
	if snap == nil || !snap.Ready {
		return fmt.Errorf("snapshot %s: %w", a.opts.Snapshot, block.ErrNotFound)
	}
	a.record = rec
	a.image, err = openChain(ctx, a.store.fs, rec.chainTo(snap.Layer), vfs.ReadOnly, nil)
	return a.unlessMoved(rec, err)
}

// unlessMoved makes ErrLocked of a failure to open layers that were being replaced just
// then, by a snapshot or a merge: the record names others by now.
func (a *Attached) unlessMoved(rec Record, err error) error {
	if err == nil {
		return nil
	}
	now, readErr := a.store.readRecord(a.name)
	if readErr == nil && !slices.Equal(now.Layers, rec.Layers) {
		return fmt.Errorf("%w: its layers have just changed: %w", block.ErrLocked, err)
	}
	return err
}

// openReadOnly needs no lock on the record: it changes nothing, and the image's own lock
// keeps writers out.
func (a *Attached) openReadOnly(ctx context.Context) error {
	rec, err := a.store.readRecord(a.name)
	if err != nil {
		return notFound(a.name, err)
	}
	if err := a.allowed(&rec); err != nil {
		return err
	}
	a.record = rec
	if err = a.store.settleRelink(&rec); err == nil {
		a.image, err = openChain(ctx, fencedFS{a.store.fs, &a.fence}, rec.Layers, vfs.ReadOnly, nil)
	}
	return a.unlessMoved(a.record, err)
}

// openWritable opens the volume's top for writing. It says in the record that this node
// serves the volume before it opens it: from then on nobody else takes snapshots, which
// could miss what is only in the journal after a kill.
func (a *Attached) openWritable(ctx context.Context) error {
	rec, err := a.store.update(ctx, a.name, func(rec *Record) error {
		if err := a.allowed(rec); err != nil {
			return err
		}
		if at := rec.attachment(a.opts.Node); at != nil && !at.Serving {
			at.Serving, a.marked = true, true
		}
		rec.Merging = nil
		return a.store.settleRelink(rec)
	})
	if err != nil {
		return err
	}
	journal, err := a.openJournal()
	if err != nil {
		return err
	}
	img, err := openChain(ctx, fencedFS{a.store.fs, &a.fence}, rec.Layers, vfs.ReadWrite, journal)
	if err != nil {
		return a.unlessMoved(rec, err)
	}
	// Nobody switches layers from here on. Whoever did so just before the lock was
	// ours made the record newer than the image that is open.
	now, err := a.store.update(ctx, a.name, func(now *Record) error {
		if err := a.allowed(now); err != nil {
			return err
		}
		if now.top() != rec.top() || len(now.Layers) != len(rec.Layers) {
			return fmt.Errorf("%w: its layers have just changed", block.ErrLocked)
		}
		now.settle()
		return nil
	})
	if err != nil {
		return errors.Join(err, img.Close())
	}
	a.image, a.record = img, now
	return nil
}

// allowed checks that the publication is this node's, and for what is intended.
func (a *Attached) allowed(rec *Record) error {
	if err := rec.exists(); err != nil {
		return err
	}
	if a.opts.Node == "" {
		for _, at := range rec.Attachments {
			if !at.ReadOnly || !a.opts.ReadOnly {
				return fmt.Errorf("%w: it is published to node %s", block.ErrBusy, at.Node)
			}
		}
		return nil
	}
	at := rec.attachment(a.opts.Node)
	switch {
	case at == nil && len(rec.Attachments) > 0:
		return fmt.Errorf("%w: it is published to node %s, not to %s", block.ErrFenced, rec.nodes(), a.opts.Node)
	case at == nil:
		return fmt.Errorf("%w: it is not published to node %s", block.ErrFenced, a.opts.Node)
	case at.Epoch != a.opts.Epoch:
		return fmt.Errorf("%w: publication %d to node %s is over, the present one is %d", block.ErrFenced, a.opts.Epoch, a.opts.Node, at.Epoch)
	case at.ReadOnly && !a.opts.ReadOnly:
		return fmt.Errorf("%w: it is published to node %s for reading", block.ErrReadOnly, a.opts.Node)
	}
	return nil
}

// openJournal returns the redo journal's place, nil if none is wanted.
func (a *Attached) openJournal() (*engine.JournalFile, error) {
	if a.opts.Journal == "" {
		return nil, nil
	}
	if a.journal == nil {
		dir, err := vfs.OpenDir(filepath.Dir(a.opts.Journal))
		if err != nil {
			return nil, fmt.Errorf("open the redo journal's directory: %w", err)
		}
		a.journal = dir
	}
	return &engine.JournalFile{FS: a.journal, Name: filepath.Base(a.opts.Journal), Epoch: a.opts.Epoch}, nil
}

func (a *Attached) closeJournal() error {
	if a.journal == nil {
		return nil
	}
	return a.journal.Close()
}

// Device returns the volume's device: a itself.
func (a *Attached) Device() block.Device { return a }

// Record returns the record as the holder last saw it.
func (a *Attached) Record() Record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.record
}

func (a *Attached) saw(rec Record) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.record = rec
}

// Stats returns the engine's counters.
func (a *Attached) Stats() engine.Stats { return a.image.Stats() }

// AllocatedBytes returns the space that the files of all layers occupy. It may hang as
// long as the store does.
func (a *Attached) AllocatedBytes() (int64, error) { return a.image.AllocatedBytes() }

// Lost delivers one error when the volume must no longer be used: another node owns it,
// or it was deleted. From then on the device fails with ErrFenced.
func (a *Attached) Lost() <-chan error { return a.lost }

// lose stops the device for good.
func (a *Attached) lose(cause error) {
	a.fence.close(cause)
	select {
	case a.lost <- a.fence.check():
	default: // it has been told
	}
}

// Close makes everything durable and lets the volume go. A second call returns what the
// first one did.
func (a *Attached) Close() error {
	a.close.Do(func() {
		a.stop()
		a.watching.Wait()
		a.lookOnceMore()
		err := a.image.Close()
		err = errors.Join(err, a.closeJournal())
		if err == nil && a.fence.check() == nil && !a.opts.ReadOnly && a.opts.Node != "" {
			err = a.stopServing()
		}
		if err != nil {
			a.closeErr = fmt.Errorf("close volume %s: %w", a.name, err)
		}
	})
	return a.closeErr
}

// lookOnceMore reads the record, and closes the fence if the volume is another's by now: after
// a store did not answer for long, closing may be the first that gets through, and would
// shorten the image to what this holder knows of it. A record that cannot be read says
// nothing: the close goes on.
func (a *Attached) lookOnceMore() {
	if a.opts.ReadOnly {
		return
	}
	rec, err := a.store.readRecord(a.name)
	if err == nil {
		err = a.allowed(&rec)
	}
	if err = notFound(a.name, err); errors.Is(err, block.ErrNotFound) || errors.Is(err, block.ErrFenced) {
		a.lose(err)
	}
}

// stopServing notes that everything is in the store: others may take snapshots now.
func (a *Attached) stopServing() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	_, err := a.store.updateAnyway(ctx, a.name, func(rec *Record) error {
		if at := rec.attachment(a.opts.Node); at != nil && at.Epoch == a.opts.Epoch {
			at.Serving = false
		}
		return nil
	})
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	return err
}

// closeWait bounds how long Close waits for the record's lock.
const closeWait = 20 * time.Second

// usable is asked before each request.
func (a *Attached) usable() error {
	a.use.note()
	return a.fence.check()
}

// ReadAt implements block.Device.
func (a *Attached) ReadAt(p []byte, off int64) (int, error) {
	if err := a.usable(); err != nil {
		return 0, err
	}
	return a.image.ReadAt(p, off)
}

// WriteAt implements block.Device.
func (a *Attached) WriteAt(p []byte, off int64) (int, error) {
	a.gate.RLock()
	defer a.gate.RUnlock()
	if err := a.usable(); err != nil {
		return 0, err
	}
	return a.image.WriteAt(p, off)
}

// WriteZeroes implements block.Device.
func (a *Attached) WriteZeroes(off, n int64, flags block.ZeroFlags) error {
	a.gate.RLock()
	defer a.gate.RUnlock()
	if err := a.usable(); err != nil {
		return err
	}
	return a.image.WriteZeroes(off, n, flags)
}

// Discard implements block.Device.
func (a *Attached) Discard(off, n int64) error {
	a.gate.RLock()
	defer a.gate.RUnlock()
	if err := a.usable(); err != nil {
		return err
	}
	return a.image.Discard(off, n)
}

// Flush implements block.Device.
func (a *Attached) Flush() error {
	if err := a.usable(); err != nil {
		return err
	}
	return a.image.Flush()
}

// Map implements block.Device.
func (a *Attached) Map(off, n int64) (block.Extent, error) {
	if err := a.usable(); err != nil {
		return block.Extent{}, err
	}
	return a.image.Map(off, n)
}

// Info implements block.Device.
func (a *Attached) Info() block.Info { return a.image.Info() }
