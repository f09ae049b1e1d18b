package engine

import (
	"errors"
	"fmt"
	"sync"
)

// flusher lets callers that ask at the same time share one run: a run that starts after
// a call began covers it.
type flusher struct {
	mu            sync.Mutex
	ended         sync.Cond
	running       bool
	started, done uint64
	err           error // of the last run
}

func (f *flusher) init() { f.ended.L = &f.mu }

func (f *flusher) do(run func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := f.started + 1
	for f.done < want && f.running {
		f.ended.Wait()
	}
	if f.done >= want {
		return f.err
	}
	f.running = true
	f.started++
	f.mu.Unlock()
	err := run()
	f.mu.Lock()
	f.running, f.done, f.err = false, f.started, err
	f.ended.Broadcast()
	return err
}

// Flush implements block.Device.
func (d *Disk) Flush() error {
	d.stats.flushes.Add(1)
	return d.flusher.do(func() error {
		d.committing.Lock()
		defer d.committing.Unlock()
		return d.commit(gateFree)
	})
}

// gateState says whether the caller of commit holds the gate exclusively.
type gateState bool

const (
	gateFree gateState = false
	gateHeld gateState = true
)

// commit makes durable what has completed: data, then tables. committing is held. A
// failure poisons the disk: what the kernel dropped cannot be written again.
func (d *Disk) commit(gate gateState) error {
	if err := d.poisoned(); err != nil {
		return err
	}
	d.stats.commits.Add(1)
	d.pressure.Store(false)
	top := d.top()
	d.mapping.Lock()
	c := newCommit(top)
	unused := d.unused
	d.unused = nil
	d.journal.rotate()
	d.mapping.Unlock()
	err := d.writeOut(top, c)
	d.mapping.Lock()
	c.release()
	d.mapping.Unlock()
	if err != nil {
		err = fmt.Errorf("flush %s: %w", top.Name, err)
		d.poison.Store(&err)
		return err
	}
	d.journal.dropOld()
	d.reuse(unused, gate)
	return nil
}

// writeOut syncs the data before anything durable refers to it, then has the codec write
// its tables.
func (d *Disk) writeOut(top *Layer, c *Commit) error {
	if err := top.syncData(); err != nil {
		return err
	}
	if len(c.sectors) == 0 {
		return nil
	}
	if err := top.Codec.Commit(c); err != nil {
		return err
	}
	return c.Sync()
}

// syncData makes guest data written to the layer's files durable.
func (l *Layer) syncData() error {
	for i := range l.unsynced {
		if !l.unsynced[i].Swap(false) {
			continue
		}
		if err := l.Files[i].Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", l.Files[i].Name(), err)
		}
	}
	return nil
}

// reuse gives space back to the codec that nothing durable refers to any more, once no
// request can still be using it: those that saw the old mapping hold the gate.
func (d *Disk) reuse(unused []Span, gate gateState) {
	if len(unused) == 0 {
		return
	}
	if gate == gateFree {
		d.gate.Lock()
		//nolint:staticcheck // the empty section is the point: it waits for all before it
		d.gate.Unlock()
	}
	top := d.top()
	for _, s := range unused {
		zeroed := !s.Shared && top.Files[s.File].PunchHole(s.Off, s.Len) == nil
		top.unsynced[s.File].Store(true)
		d.mapping.Lock()
		if zeroed {
			top.Tables.unreserve(s.File, s.Off, s.Len)
		}
		top.Codec.Free(s, zeroed)
		top.Tables.letGo()
		d.mapping.Unlock()
	}
}

// Replay applies what a killed process left in the journal to the image it was written
// for, durably, and empties the journal. The layer must be opened anew when it returns
// true: its codec may remember what was there before. It can be killed and repeated.
func Replay(l *Layer, file *JournalFile) (applied bool, err error) {
	records, newer, err := readJournal(file, l.journalIdentity())
	if err != nil {
		return false, err
	}
	if len(records) > 0 {
		l.prepare()
		if err := l.replay(records); err != nil {
			return false, fmt.Errorf("replay the journal of %s: %w", l.Name, err)
		}
	}
	return len(records) > 0, removeJournal(file, newer)
}

func (l *Layer) replay(records []redoRecord) error {
	for _, r := range records {
		if r.file >= len(l.Files) {
			return fmt.Errorf("record for file %d of %d: %w", r.file, len(l.Files), errJournal)
		}
		if err := l.Tables.Write(r.stage, r.file, r.off, r.data); err != nil {
			return err
		}
	}
	for _, f := range l.Files {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", f.Name(), err)
		}
	}
	c := newCommit(l)
	return errors.Join(l.Codec.Commit(c), c.Sync())
}
