package engine

import (
	"cmp"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Disk is a chain of layers as a block.Device. The top layer is written, if it was
// opened for writing; the others never are.
type Disk struct {
	gate   sync.RWMutex // see the package's documentation: Locks
	layers []*Layer     // top first; changed with gate and committing held
	// answering is replaced with layers; its contents are guarded by mapping.
	answering *answering
	mapping   mappingLock
	claims    claims

	// committing is held while tables are committed, and by what must not run
	// beside a commit: Push, Resize, Close. It is outside gate.
	committing sync.Mutex
	flusher    flusher

	beginning sync.Mutex
	begun     atomic.Bool // the top layer has been marked as being changed

	unused   []Span      // freed by changes not committed yet; guarded by mapping
	pressure atomic.Bool // uncommitted tables or journal grew large: commit soon
	journal  *journal    // nil without
	poison   atomic.Pointer[error]
	size     atomic.Int64
	inflated inflatedCache
	options  Options
	stats    counters
}

// Options shape a Disk.
type Options struct {
	// Journal keeps changes of tables across a kill of the process; nil: they are
	// lost with it, back to the last flush. It must have been replayed (Replay).
	Journal *JournalFile
	// TableCacheBytes bounds the memory for cached tables, of all layers together; 0
	// means 32 MiB. A layer keeps a few pages whatever it is.
	TableCacheBytes int64
}

// New returns the device that layers, a chain with the top one first, make up. It owns
// them from now on, unless it fails.
func New(layers []*Layer, opts Options) (*Disk, error) {
	if len(layers) == 0 {
		return nil, fmt.Errorf("disk without layers: %w", block.ErrInvalid)
	}
	d := &Disk{layers: layers, options: opts}
	d.claims.init()
	d.flusher.init()
	for _, l := range layers {
		l.prepare()
	}
	d.chainChanged()
	top := layers[0]
	d.size.Store(top.geometry.SizeBytes)
	if opts.Journal != nil && d.writable() == nil {
		j, err := openJournal(opts.Journal)
		if err != nil {
			return nil, err
		}
		d.journal = j
		d.recordTop()
	}
	return d, nil
}

// prepare makes what the engine keeps per layer.
func (l *Layer) prepare() {
	l.geometry = l.Codec.Geometry()
	l.unsynced = make([]atomic.Bool, len(l.Files))
	for i := range l.unsynced {
		// A process that was killed may have written what nobody has synced yet. Its
		// clients were told that it is written: the next flush has to cover it.
		l.unsynced[i].Store(l.Writable)
	}
}

// chainChanged fits to the chain what is kept beside it: nobody uses the disk.
func (d *Disk) chainChanged() {
	d.answering = newAnswering(len(d.layers), d.top().geometry.SizeBytes)
	budget := cmp.Or(d.options.TableCacheBytes, defaultTableCacheBytes)
	share := budget
	if len(d.layers) > 1 {
		d.top().Tables.setLimit(budget / 2)
		share = budget / 2 / int64(len(d.layers)-1)
	}
	for _, l := range d.layers[min(1, len(d.layers)-1):] {
		l.Tables.setLimit(share)
	}
}

// recordTop directs the top layer's table changes into the journal.
func (d *Disk) recordTop() {
	if d.journal != nil {
		d.layers[0].Tables.record = d.journal.add
	}
}

func (d *Disk) top() *Layer { return d.layers[0] }

// Layers returns the chain, top first. The slice is the caller's, the layers are not.
func (d *Disk) Layers() []*Layer {
	d.gate.RLock()
	defer d.gate.RUnlock()
	return append([]*Layer(nil), d.layers...)
}

// Info implements block.Device.
func (d *Disk) Info() block.Info {
	d.gate.RLock()
	defer d.gate.RUnlock()
	g := d.top().geometry
	readOnly := d.writable() != nil
	return block.Info{
		SizeBytes:         d.size.Load(),
		LogicalBlockBytes: g.LogicalBlockBytes,
		ClusterBytes:      g.ClusterBytes,
		ReadOnly:          readOnly,
		CanDiscard:        !readOnly,
		CanZero:           !readOnly,
	}
}

// writable returns why the disk cannot be written, or nil.
func (d *Disk) writable() error {
	top := d.top()
	if !top.Writable || top.geometry.ReadOnly {
		return fmt.Errorf("%s: %w", top.Name, block.ErrReadOnly)
	}
	return nil
}

// checkWrite returns why a range cannot be written, or nil.
func (d *Disk) checkWrite(off, n int64) error {
	if err := block.CheckRange(off, n, d.size.Load()); err != nil {
		return err
	}
	if err := d.writable(); err != nil {
		return err
	}
	return d.poisoned()
}

func (d *Disk) poisoned() error {
	if cause := d.poison.Load(); cause != nil {
		return fmt.Errorf("%w (%w)", block.ErrPoisoned, *cause)
	}
	return nil
}

// noteLost poisons the disk if c was lost: if a sync failed, the kernel may have dropped guest
// data with it, also that of an earlier process, and would not say so again.
func (d *Disk) noteLost(c *Commit) {
	if c.lost != nil {
		d.poison.Store(&c.lost)
	}
}

// begin marks the top layer as being changed, once, before its first change.
func (d *Disk) begin() error {
	if d.begun.Load() {
		return nil
	}
	d.beginning.Lock()
	defer d.beginning.Unlock()
	if d.begun.Load() {
		return nil
	}
	d.mapping.Lock()
	defer d.mapping.Unlock()
	top := d.top()
	c := bareCommit(top)
	defer d.noteLost(c)
	if err := top.Codec.Begin(c); err != nil {
		return fmt.Errorf("mark %s as being changed: %w", top.Name, err)
	}
	if err := c.Sync(); err != nil {
		return fmt.Errorf("mark %s as being changed: %w", top.Name, err)
	}
	d.journal.start(top.journalIdentity())
	d.begun.Store(true)
	return nil
}

// Base returns the top layer for an overlay to be created on, which Push then puts on it.
// The first change after opening gives an image another identity, and a change that
// failed leaves it uncertain on disk; Base makes it certain, and from then on it stays.
func (d *Disk) Base() (*Layer, error) {
	d.gate.RLock()
	defer d.gate.RUnlock()
	if err := errors.Join(d.writable(), d.poisoned()); err != nil {
		return nil, err
	}
	if err := d.begin(); err != nil {
		return nil, err
	}
	return d.top(), nil
}

// Push makes top, an empty overlay on the present top layer (see Base) that is open for
// writing, the layer that is written. The old one holds every write that had returned,
// durably, and never changes again; its lock is lowered to one for reading. Requests wait while
// the last changes are made durable.
//
// When Push fails and Layers does not begin with top, nothing has changed, and top stays
// the caller's. When it does, the switch is done and durable, and the error says what
// could not be tidied in the old layer: surplus space stays, or others stay locked out.
func (d *Disk) Push(top *Layer) error {
	if err := d.Flush(); err != nil {
		return err
	}
	d.committing.Lock()
	defer d.committing.Unlock()
	old, err := d.switchTop(top)
	if err != nil {
		return fmt.Errorf("switch to %s: %w", top.Name, err)
	}
	return d.freeze(old)
}

func (d *Disk) switchTop(top *Layer) (old *Layer, err error) {
	d.gate.Lock()
	defer d.gate.Unlock()
	if err := d.writable(); err != nil {
		return nil, err
	}
	old = d.top()
	if top.Parent != nil && top.Parent.Verify != nil {
		if err := top.Parent.Verify(old); err != nil {
			return nil, fmt.Errorf("%s is no overlay on %s as it is now: %w", top.Name, old.Name, err)
		}
	}
	if err := d.commit(gateHeld); err != nil {
		return nil, err
	}
	old.changed = d.begun.Load()
	old.Tables.record = nil
	top.prepare()
	d.layers = append([]*Layer{top}, d.layers...)
	d.chainChanged()
	d.begun.Store(false)
	d.recordTop()
	d.size.Store(top.geometry.SizeBytes)
	d.journal.empty()
	return old, nil
}

// freeze leaves a layer that is no longer written as a clean close would. It cannot
// harm what was switched: a failure leaves surplus space, or others locked out.
func (d *Disk) freeze(l *Layer) error {
	l.Writable = false
	if l.changed {
		c := bareCommit(l)
		d.mapping.Lock() // requests look the layer up again already
		err := l.Codec.Finish(c)
		d.mapping.Unlock()
		if err = errors.Join(err, c.Sync()); err != nil {
			return fmt.Errorf("tidy %s: %w", l.Name, err)
		}
	}
	for _, f := range l.Files {
		if err := f.Lock(vfs.LockRead); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("lower the lock of %s: %w", f.Name(), err)
		}
	}
	return nil
}

// Close implements block.Device.
func (d *Disk) Close() error {
	err := d.finish()
	for _, l := range d.layers {
		err = errors.Join(err, l.Close())
	}
	return errors.Join(err, d.journal.close(err == nil))
}

// finish makes everything durable and leaves the top image as a clean close should. An
// image that failed is left as it is: its journal can still bring changes back.
func (d *Disk) finish() error {
	if d.writable() != nil {
		return nil
	}
	if err := d.Flush(); err != nil || !d.begun.Load() {
		return err
	}
	d.committing.Lock()
	defer d.committing.Unlock()
	// Freeing what the flush made unused may have changed tables once more.
	if err := d.commit(gateFree); err != nil {
		return err
	}
	c := bareCommit(d.top())
	if err := errors.Join(d.top().Codec.Finish(c), c.Sync()); err != nil {
		return fmt.Errorf("tidy %s: %w", d.top().Name, err)
	}
	return nil
}
