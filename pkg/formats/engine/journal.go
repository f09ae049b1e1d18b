package engine

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// JournalFile is where a disk's redo journal is kept: two files, Name+".0" and ".1", on
// a file system that survives a kill of the process, not a reboot (tmpfs): what is lost
// with a reboot was not flushed.
//
// Layout of a segment, little-endian:
//
//	magic[8] sequence[8] epoch[8] identityLen[4] crc32c[4] identity…
//	then records: length[4] crc32c[4] stage[1] file[1] zero[2] off[8] data[length-12]
//
// Segments are written alternately, a new one from each commit on, and hold what came
// after it; the lower sequence is older. The first record that is cut off or fails its
// sum ends a segment: its write had not completed.
type JournalFile struct {
	FS    vfs.FS
	Name  string
	Epoch int64 // of the attachment: another's journal is not replayed
}

const (
	journalMagic        = "IMGREDO1"
	journalHeaderBytes  = 32
	journalRecordBytes  = 20 // header of a record
	maxJournalBytes     = 32 << 20
	maxJournalRecord    = 1 << 20
	maxJournalIdentity  = 4096
	maxReplayBytes      = 2*maxJournalBytes + 2*maxJournalRecord
	journalLengthPrefix = 8 // bytes of a record before what its length counts
)

var (
	errJournal = errors.New("redo journal is damaged")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// redoRecord is one change of table bytes.
type redoRecord struct {
	stage Stage
	file  int
	off   int64
	data  []byte
}

// journal notes changes of tables until a commit has made them durable. A nil journal
// notes nothing. add and rotate are called with the mapping lock held exclusively.
type journal struct {
	file JournalFile

	mu       sync.Mutex
	segments [2]vfs.File
	active   int
	sequence uint64
	identity []byte
	end      int64  // of the active segment
	pending  []byte // records not yet in it
	failed   error  // since the last rotate: the segment lacks records
	size     atomic.Int64
}

func openJournal(file *JournalFile) (*journal, error) {
	j := &journal{file: *file}
	for i := range j.segments {
		f, err := openOrCreate(file.FS, file.segment(i))
		if err == nil {
			j.segments[i] = f
			err = f.Truncate(0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open redo journal %s: %w", file.segment(i), err), j.release())
		}
	}
	return j, nil
}

// release closes the segments that are open.
func (j *journal) release() error {
	var errs []error
	for _, f := range j.segments {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

func openOrCreate(fsys vfs.FS, name string) (vfs.File, error) {
	f, err := fsys.Create(name)
	if errors.Is(err, fs.ErrExist) {
		return fsys.Open(name, vfs.ReadWrite)
	}
	return f, err
}

func (f *JournalFile) segment(i int) string { return fmt.Sprintf("%s.%d", f.Name, i) }

// start begins an empty journal for an image that has an identity. A failure shows in
// sync, as every failure of the journal does.
func (j *journal) start(identity []byte) {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.identity = bytes.Clone(identity)
	j.pending = j.pending[:0]
	j.failed = errors.Join(j.truncate(1-j.active), j.begin(j.active))
}

// empty drops everything: all of it is durable in the image. What cannot be dropped is
// for an image of another identity than the next one's.
func (j *journal) empty() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.pending, j.identity = j.pending[:0], nil
	j.failed = errors.Join(j.truncate(0), j.truncate(1))
}

func (j *journal) truncate(i int) error {
	if err := j.segments[i].Truncate(0); err != nil {
		return fmt.Errorf("empty redo journal %s: %w", j.file.segment(i), err)
	}
	return nil
}

// begin makes segment i, which is empty, the active one.
func (j *journal) begin(i int) error {
	if err := j.truncate(i); err != nil {
		return err
	}
	j.active = i
	j.sequence++
	h := make([]byte, journalHeaderBytes, journalHeaderBytes+len(j.identity))
	copy(h, journalMagic)
	binary.LittleEndian.PutUint64(h[8:], j.sequence)
	binary.LittleEndian.PutUint64(h[16:], uint64(j.file.Epoch))
	binary.LittleEndian.PutUint32(h[24:], uint32(len(j.identity)))
	h = append(h, j.identity...)
	binary.LittleEndian.PutUint32(h[28:], crc32.Checksum(h, castagnoli))
	j.end = int64(len(h))
	if _, err := j.segments[i].WriteAt(h, 0); err != nil {
		return fmt.Errorf("begin redo journal %s: %w", j.file.segment(i), err)
	}
	return nil
}

// add notes a change; sync brings it into the file.
func (j *journal) add(r redoRecord) {
	j.mu.Lock()
	defer j.mu.Unlock()
	start := len(j.pending)
	j.pending = append(j.pending, make([]byte, journalRecordBytes)...)
	j.pending = append(j.pending, r.data...)
	b := j.pending[start:]
	binary.LittleEndian.PutUint32(b, uint32(len(b)-journalLengthPrefix))
	b[8], b[9] = byte(r.stage), byte(r.file)
	binary.LittleEndian.PutUint64(b[12:], uint64(r.off))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
}

// sync returns once everything added before is in the file. After a failure it fails
// until a commit has made the journal dispensable.
func (j *journal) sync() error {
	if j == nil {
		return nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.write()
}

func (j *journal) write() error {
	if j.failed != nil || len(j.pending) == 0 {
		return j.failed
	}
	if _, err := j.segments[j.active].WriteAt(j.pending, j.end); err != nil {
		j.failed = fmt.Errorf("write redo journal %s: %w", j.file.segment(j.active), err)
		return j.failed
	}
	j.end += int64(len(j.pending))
	j.size.Store(j.end)
	j.pending = j.pending[:0]
	return nil
}

// rotate directs further records into the other segment: those noted until now are what
// the commit that begins makes durable, so that their failures are past.
func (j *journal) rotate() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.identity == nil {
		return // not begun: nothing was noted
	}
	err := j.write()
	j.pending = j.pending[:0]
	// Whoever waits to have noted what could not be written must see that it failed.
	j.failed = errors.Join(err, j.begin(1-j.active))
	j.size.Store(j.end)
}

// dropOld forgets what the commit that has ended made durable. If that fails it is
// merely replayed once more, before anything newer.
func (j *journal) dropOld() {
	if j == nil {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	_ = j.truncate(1 - j.active)
}

// large reports whether a commit should shorten the journal.
func (j *journal) large() bool { return j != nil && j.size.Load() > maxJournalBytes }

// close ends the journal; clean says that all of it is durable in the image.
func (j *journal) close(clean bool) error {
	if j == nil {
		return nil
	}
	err := j.release()
	if clean {
		err = errors.Join(err, removeJournal(&j.file, j.active))
	}
	return err
}

// removeJournal removes both segments, the older one first: a kill in between must not
// leave the older one's records alone, which the newer one's have overtaken.
func removeJournal(file *JournalFile, newer int) error {
	for _, i := range []int{1 - newer, newer} {
		if err := file.FS.Remove(file.segment(i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove redo journal: %w", err)
		}
	}
	return nil
}

// readJournal returns the records that are to be replayed onto an image, in order, and
// which segment is the newer one: no records when the journal is missing or was written
// for another image or attachment.
func readJournal(file *JournalFile, identity []byte) (records []redoRecord, newer int, err error) {
	var found [2]segment
	for i := range found {
		s, err := readSegment(file, i, identity)
		if err != nil {
			return nil, 0, fmt.Errorf("read redo journal %s: %w", file.segment(i), err)
		}
		found[i] = s
	}
	if found[1].sequence > found[0].sequence {
		newer = 1
	}
	return append(found[1-newer].records, found[newer].records...), newer, nil
}

type segment struct {
	sequence uint64
	records  []redoRecord
}

func readSegment(file *JournalFile, i int, identity []byte) (segment, error) {
	f, err := file.FS.Open(file.segment(i), vfs.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return segment{}, nil
	}
	if err != nil {
		return segment{}, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return segment{}, err
	}
	if size > maxReplayBytes {
		return segment{}, fmt.Errorf("%d bytes long, at most %d are written: %w", size, maxReplayBytes, errJournal)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && err != io.EOF {
		return segment{}, err
	}
	return parseSegment(b, file.Epoch, identity), nil
}

// parseSegment returns the intact records of a segment that is for this image, or none.
func parseSegment(b []byte, epoch int64, identity []byte) segment {
	if len(b) < journalHeaderBytes || string(b[:8]) != journalMagic {
		return segment{}
	}
	n := binary.LittleEndian.Uint32(b[24:])
	if n > maxJournalIdentity || int(n) > len(b)-journalHeaderBytes {
		return segment{}
	}
	header := bytes.Clone(b[:journalHeaderBytes+int(n)])
	sum := binary.LittleEndian.Uint32(header[28:])
	clear(header[28:32])
	if crc32.Checksum(header, castagnoli) != sum ||
		int64(binary.LittleEndian.Uint64(header[16:])) != epoch || !bytes.Equal(header[journalHeaderBytes:], identity) {
		return segment{}
	}
	return segment{binary.LittleEndian.Uint64(header[8:]), parseRecords(b[len(header):])}
}

func parseRecords(b []byte) (records []redoRecord) {
	for len(b) >= journalRecordBytes {
		n := int64(binary.LittleEndian.Uint32(b)) + journalLengthPrefix
		if n < journalRecordBytes || n > int64(len(b)) || n > maxJournalRecord {
			return records
		}
		if crc32.Checksum(b[8:n], castagnoli) != binary.LittleEndian.Uint32(b[4:]) {
			return records
		}
		off := int64(binary.LittleEndian.Uint64(b[12:]))
		if off < 0 {
			return records
		}
		records = append(records, redoRecord{
			stage: Stage(b[8]), file: int(b[9]), off: off, data: b[journalRecordBytes:n],
		})
		b = b[n:]
	}
	return records
}
