package formattest_test

import (
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// toy is the smallest format that uses all of the engine: a header sector, one table of
// 8-byte entries, clusters appended, a zero state, overlays. It is what the suite itself
// is tested with, right and with bugs.
//
//	0     magic[8] guest size[8] cluster size[8] entries[8] times changed[8] linkLen[8] parent's format:name…
//	4096  entries: 0 absent, 1 zero, else the file offset of a cluster, +2 if it is compressed:
//	      length[4] and a deflate stream; +6: the same, but as it is
//
// Encrypted, it is a format of its own.
type toy struct {
	bug       toyBug
	encrypted bool
	password  string // of encrypted ones; "" means that nobody is asked
	stream    bool   // it is filled once; a format of its own, too
}

// toyBug is a mistake that a format could make.
type toyBug string

const (
	toyMagic        = "TOYIMAGE"
	toyTableOff     = 4096
	toyClusterBytes = 4096
	toyGrowFactor   = 4 // how far the table allows an image to grow
	toyMaxBytes     = 64 << 20
	toyMaxName      = 255

	toyAbsent         = 0
	toyZero           = 1
	toyCompressed     = 2 // flags
	toyIncompressible = 4
	toyFlags          = toyCompressed | toyIncompressible
)

func (b toyBug) is(name string) bool { return string(b) == name }

func toyEntryOff(index int64) int64    { return toyTableOff + 8*index }
func toyDataStart(entries int64) int64 { return toyAlign(toyEntryOff(entries)) }
func toyAlign(n int64) int64           { return (n + toyClusterBytes - 1) / toyClusterBytes * toyClusterBytes }

func toyWrong(format string, args ...any) error {
	return fmt.Errorf("toy: %w: %w", block.ErrCorrupt, fmt.Errorf(format, args...))
}

func (f toy) Name() string {
	if f.encrypted {
		return "toycrypt"
	}
	if f.stream {
		return "toystream"
	}
	return "toy"
}

func (toy) Probe(head []byte, _ int64) bool { return len(head) >= 8 && string(head[:8]) == toyMagic }

func (f toy) Options() formats.Options {
	return formats.Options{
		OverlaySubformats: []string{""}, ParentFormats: []string{f.Name(), "raw"}, Preallocations: []formats.Preallocation{formats.PreallocateOff},
		MinClusterBytes: toyClusterBytes, MaxClusterBytes: toyClusterBytes, DefaultClusterBytes: toyClusterBytes,
		MaxSizeBytes: toyMaxBytes, SizeMultiple: 512,
	}
}

func (toy) Measure(_ formats.CreateRequest, dataBytes int64) (int64, error) { return dataBytes, nil }

var toyWaste []byte // keeps what a bug allocates

type toyHeader struct {
	size, entries int64
	changes       uint64 // times that the image was opened and changed
	parent        string // "format:name"
}

func toyLink(name string, parent *engine.Parent) string {
	if parent == nil {
		return ""
	}
	return parent.Layer.Format + ":" + vfs.RelativeLink(name, parent.Name)
}

func (h *toyHeader) marshal() []byte {
	b := []byte(toyMagic)
	for _, v := range []uint64{uint64(h.size), toyClusterBytes, uint64(h.entries), h.changes, uint64(len(h.parent))} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	b = append(b, h.parent...)
	return append(b, make([]byte, 512-len(b))...)
}

func parseToyHeader(b []byte) (toyHeader, error) {
	if len(b) < 512 || string(b[:8]) != toyMagic {
		return toyHeader{}, toyWrong("no header")
	}
	at := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	h := toyHeader{size: int64(at(1)), entries: int64(at(3)), changes: at(4)}
	if at(2) != toyClusterBytes || h.size <= 0 || h.size > toyMaxBytes || h.entries < toyAlign(h.size)/toyClusterBytes || h.entries > toyMaxBytes {
		return h, toyWrong("size %d, %d entries", h.size, h.entries)
	}
	if at(5) > toyMaxName {
		return h, toyWrong("name of %d bytes", at(5))
	}
	h.parent = string(b[48 : 48+at(5)])
	return h, nil
}

func (f toy) Create(_ context.Context, req formats.CreateRequest) error {
	h := toyHeader{size: req.SizeBytes}
	if f.password != "" {
		if _, err := req.Secret.Ask(req.Name); err != nil {
			return err
		}
	}
	h.parent = toyLink(req.Name, req.Parent)
	if req.Parent != nil && h.size == 0 {
		h.size = req.Parent.Layer.Codec.Geometry().SizeBytes
	}
	h.entries = toyGrowFactor * toyAlign(h.size) / toyClusterBytes
	file, err := req.FS.Create(req.Name)
	if err != nil {
		return err
	}
	err = file.Truncate(toyDataStart(h.entries))
	if err == nil {
		_, err = file.WriteAt(h.marshal(), 0)
	}
	if err == nil && !f.bug.is("create without sync") {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = req.FS.SyncDir(path.Dir(req.Name))
	}
	if err != nil && !f.bug.is("failed create leaves a file") {
		err = errors.Join(err, req.FS.Remove(req.Name))
	}
	return err
}

func (f toy) Open(req formats.OpenRequest) (*engine.Layer, error) {
	file, err := req.FS.Open(req.Name, req.Mode)
	if err != nil {
		return nil, err
	}
	l := engine.NewLayer(req.Name, f.Name(), []vfs.File{file}, req.Mode == vfs.ReadWrite)
	err = f.fill(l, file, req)
	if err == nil && f.password != "" {
		err = f.askPassword(req)
	}
	if err != nil {
		if f.bug.is("failed open leaks the file") {
			return nil, err
		}
		return nil, errors.Join(err, file.Close())
	}
	return l, nil
}

func (f toy) askPassword(req formats.OpenRequest) error {
	password, err := req.Secret.Ask(req.Name)
	if f.bug.is("no password is needed") {
		return nil
	}
	if err == nil && string(password) != f.password {
		err = fmt.Errorf("wrong password: %w", block.ErrInvalid)
	}
	return err
}

func (f toy) fill(l *engine.Layer, file vfs.File, req formats.OpenRequest) error {
	kind := vfs.LockRead
	if req.Mode == vfs.ReadWrite {
		kind = vfs.LockWrite
	}
	if !req.NoLock && !f.bug.is("no lock") {
		if err := file.Lock(kind); err != nil {
			return err
		}
	}
	size, err := file.Size()
	if err != nil {
		return err
	}
	head := make([]byte, min(size, 512))
	if _, err := file.ReadAt(head, 0); err != nil {
		return err
	}
	if len(head) == 512 && f.bug.is("header decides about memory") {
		claimed := binary.LittleEndian.Uint64(head[24:]) // not checked yet
		toyWaste = make([]byte, 8*min(claimed, 1<<25))
	}
	h, err := parseToyHeader(head)
	if err != nil {
		return err
	}
	if size < toyDataStart(h.entries) {
		return toyWrong("%s is %d bytes long", req.Name, size)
	}
	if size%toyClusterBytes != 0 && f.bug.is("odd length is refused") {
		return toyWrong("%s is %d bytes long", req.Name, size)
	}
	c := &toyCodec{toy: f, l: l, h: h, file: file, filled: size > toyDataStart(h.entries)}
	if c.bug.is("all tables are kept") {
		c.kept = bytes.Repeat([]byte{1}, int(min(toyEntryOff(h.entries)*256, 256<<20)))
	}
	c.space = engine.NewSpace(file, 0, size, toyClusterBytes, 0)
	l.Codec = c
	if h.parent != "" && !f.bug.is("parent is ignored") {
		format, link, _ := strings.Cut(h.parent, ":")
		name, err := vfs.Resolve(req.Name, link)
		if err != nil {
			return err
		}
		if f.bug.is("parent's format is forgotten") {
			format = ""
		}
		l.Parent = &engine.ParentLink{Name: name, Format: format}
	}
	return nil
}

type toyCodec struct {
	toy
	l     *engine.Layer
	file  vfs.File
	h     toyHeader
	space *engine.Space
	kept  []byte // what a bug keeps
	// filled says that an image had contents when it was opened.
	filled bool
}

func (c *toyCodec) Geometry() engine.Geometry {
	g := engine.Geometry{SizeBytes: c.h.size, ClusterBytes: toyClusterBytes, LogicalBlockBytes: 512, ZeroState: true}
	if c.stream {
		g.Sequential, g.ReadOnly = !c.filled, c.filled && !c.bug.is("stream can be changed")
	}
	if c.encrypted && !c.bug.is("stored as plain text") {
		g.Cipher = toyCipher{}
	}
	return g
}

// toyCipher adds something to every byte that depends on its sector's other bytes: a
// sector that is encrypted in two parts does not come back.
type toyCipher struct{}

func (toyCipher) Encrypt(p []byte, guestOff int64) {
	var key byte
	for i := range p {
		if i%512 == 0 {
			key = byte((guestOff+int64(i))/512) + 1
		}
		p[i] += key
		key = key*5 + p[i]
	}
}

func (toyCipher) Decrypt(p []byte, guestOff int64) {
	var key byte
	for i := range p {
		if i%512 == 0 {
			key = byte((guestOff+int64(i))/512) + 1
		}
		was := p[i]
		p[i] -= key
		key = key*5 + was
	}
}

func (c *toyCodec) Granule(off int64) (start, end int64) {
	start = off / toyClusterBytes * toyClusterBytes
	return start, start + toyClusterBytes
}

func (c *toyCodec) Identity() []byte             { return binary.LittleEndian.AppendUint64(nil, c.h.changes) }
func (c *toyCodec) Describe() engine.Description { return engine.Description{} }
func (c *toyCodec) Close() error                 { return nil }

func (c *toyCodec) entry(index int64) (int64, error) {
	var b [8]byte
	if err := c.l.Tables.Read(0, toyEntryOff(index), b[:]); err != nil {
		return 0, err
	}
	e := int64(binary.LittleEndian.Uint64(b[:]))
	if e == toyAbsent || e == toyZero {
		return e, nil
	}
	whole := e
	e &^= toyFlags
	size, err := c.file.Size()
	if err != nil {
		return 0, err
	}
	if e < toyDataStart(c.h.entries) || e%toyClusterBytes != 0 || e > size-toyClusterBytes {
		if c.bug.is("panic at a bad entry") {
			panic("bad entry")
		}
		return 0, toyWrong("entry %d is %#x", index, e)
	}
	return whole, nil
}

func (c *toyCodec) Lookup(off, n int64) (run engine.Run, err error) {
	for run.Len < n {
		e, err := c.entry((off + run.Len) / toyClusterBytes)
		if err != nil && run.Len > 0 {
			return run, nil // the caller comes to it
		}
		if err != nil {
			return run, err
		}
		next := engine.Run{State: toyState(e), FileOff: e + (off+run.Len)%toyClusterBytes}
		if next.State == engine.Compressed {
			if run.Len > 0 {
				return run, nil
			}
			return engine.Run{
				State: engine.Compressed, Len: min(n, toyClusterBytes-off%toyClusterBytes), FileOff: e &^ toyFlags, CompressedLen: toyClusterBytes - e&toyIncompressible,
				GranuleOff: off / toyClusterBytes * toyClusterBytes, GranuleLen: toyClusterBytes,
			}, nil
		}
		switch {
		case run.Len == 0:
			run = next
		case run.State != next.State || run.State == engine.Data && run.FileOff+run.Len != next.FileOff && !c.bug.is("run is too long"):
			return run, nil
		}
		run.Len = min(n, run.Len+toyClusterBytes-(off+run.Len)%toyClusterBytes)
	}
	return run, nil
}

func toyState(e int64) engine.State {
	switch e {
	case toyAbsent:
		return engine.Absent
	case toyZero:
		return engine.Zero
	}
	if e&toyCompressed != 0 {
		return engine.Compressed
	}
	return engine.Data
}

func (c *toyCodec) ReadCompressed(run engine.Run, p []byte) error {
	stored := make([]byte, toyClusterBytes)
	if _, err := c.file.ReadAt(stored, run.FileOff); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(stored)
	if run.CompressedLen < toyClusterBytes {
		copy(p, stored)
		return nil
	}
	if n > toyClusterBytes-4 {
		return toyWrong("%d compressed bytes", n)
	}
	inflater := flate.NewReader(bytes.NewReader(stored[4 : 4+n]))
	if c.bug.is("inflates without end") {
		b, err := io.ReadAll(inflater)
		toyWaste = b
		copy(p, b)
		return err
	}
	if c.bug.is("inflates too little") {
		p = p[:len(p)-1]
	}
	if _, err := io.ReadFull(inflater, p); err != nil {
		return toyWrong("inflate: %v", err)
	}
	return nil
}

func (c *toyCodec) Compress(_ int64, p []byte) ([]byte, error) {
	stored := bytes.NewBuffer(make([]byte, 4))
	w, err := flate.NewWriter(stored, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(p); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil || stored.Len() >= toyClusterBytes {
		if c.stream && err == nil { // it cannot be plain
			return bytes.Clone(p), nil
		}
		return nil, err
	}
	binary.LittleEndian.PutUint32(stored.Bytes(), uint32(stored.Len()-4))
	return append(stored.Bytes(), make([]byte, toyClusterBytes-1-stored.Len())...), nil
}

// AllocateCompressed gives a cluster; how much of it is asked for says what it is for.
func (c *toyCodec) AllocateCompressed(off, n int64) (engine.Place, error) {
	p, err := c.Allocate(off, toyClusterBytes)
	p.Len = n
	return p, err
}

func (c *toyCodec) Allocate(_, n int64) (engine.Place, error) {
	p, err := c.space.Alloc(n, toyClusterBytes)
	if err != nil {
		return p, err
	}
	if err := c.file.Allocate(p.Off, p.Len); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		if c.bug.is("no space is another error") {
			err = errors.New("something is wrong")
		}
		c.space.Free(p.Off, p.Len, p.Zeroed)
		return engine.Place{}, err
	}
	if c.bug.is("space is given twice") && p.Len > toyClusterBytes {
		c.space.Free(p.Off, toyClusterBytes, true)
	}
	return p, nil
}

func (c *toyCodec) Set(off, n int64, to engine.State, at engine.Place) (unused []engine.Span, err error) {
	first := off / toyClusterBytes
	entries := make([]byte, 0, 8*n/toyClusterBytes)
	for i := range n / toyClusterBytes {
		old, err := c.entry(first + i)
		if err != nil {
			return nil, err
		}
		if old > toyZero {
			unused = append(unused, engine.Span{Off: old &^ toyFlags, Len: toyClusterBytes})
		}
		e := int64(toyAbsent)
		switch to {
		case engine.Zero:
			e = toyZero
			if c.bug.is("zero is absent") {
				e = toyAbsent
			}
		case engine.Data:
			e = at.Off + i*toyClusterBytes
		case engine.Compressed:
			e = at.Off + toyCompressed
			if at.Len == toyClusterBytes {
				e += toyIncompressible
			}
		}
		entries = binary.LittleEndian.AppendUint64(entries, uint64(e))
	}
	if err := c.l.Tables.Write(0, 0, toyEntryOff(first), entries); err != nil {
		return nil, err
	}
	if c.bug.is("freed at once") {
		for _, s := range unused {
			c.space.Free(s.Off, s.Len, false)
		}
		return nil, nil
	}
	return unused, nil
}

func (c *toyCodec) Free(s engine.Span, zeroed bool) {
	if !c.bug.is("space is lost") {
		c.space.Free(s.Off, toyAlign(s.Len), zeroed)
	}
}

func (c *toyCodec) Begin(commit *engine.Commit) error {
	h := c.h
	if !c.bug.is("changes are not counted") {
		h.changes++
	}
	if err := commit.WriteAt(0, h.marshal(), 0); err != nil {
		return err
	}
	if err := commit.Sync(); err != nil {
		return err
	}
	c.h = h
	return nil
}

func (c *toyCodec) Commit(commit *engine.Commit) error {
	if c.bug.is("commit writes nothing") {
		return nil
	}
	return commit.WriteTables(0)
}

func (c *toyCodec) Finish(*engine.Commit) error { return c.space.Trim() }

func (c *toyCodec) Resize(commit *engine.Commit, size int64) error {
	if !c.bug.is("grow takes any size") && (size <= 0 || toyAlign(size)/toyClusterBytes > c.h.entries || size%512 != 0) {
		return fmt.Errorf("toy: resize to %d bytes: %w", size, block.ErrInvalid)
	}
	h := c.h
	h.size = size
	if c.bug.is("shrink loses what stays") && size < c.h.size {
		h.size -= 512
	}
	if c.bug.is("shrink is not durable") && size < c.h.size {
		c.h = h
		return nil
	}
	if err := commit.WriteAt(0, h.marshal(), 0); err != nil && !c.bug.is("error is swallowed") {
		return err
	}
	if err := commit.Sync(); err != nil {
		return err
	}
	c.h = h
	return nil
}

func (c *toyCodec) SetParent(commit *engine.Commit, parent *engine.Parent) error {
	h := c.h
	if c.bug.is("rebase takes two steps") {
		h.parent = ""
		if err := commit.WriteAt(0, h.marshal(), 0); err != nil {
			return err
		}
	}
	h.parent = toyLink(c.l.Name, parent)
	if c.bug.is("rebase writes nothing") {
		return nil
	}
	if err := commit.WriteAt(0, h.marshal(), 0); err != nil {
		return err
	}
	if err := commit.Sync(); err != nil {
		return err
	}
	c.h, c.l.Parent = h, nil
	if parent != nil {
		c.l.Parent = &engine.ParentLink{Name: parent.Name, Format: parent.Layer.Format}
	}
	return nil
}

func (c *toyCodec) Check(_ context.Context, repair *engine.Commit, _ func(done, total int64)) (engine.CheckResult, error) {
	if repair != nil && c.bug.is("repair harms data") {
		return engine.CheckResult{}, repair.WriteAt(0, make([]byte, 8), toyEntryOff(3))
	}
	size, err := c.file.Size()
	if err != nil {
		return engine.CheckResult{}, err
	}
	var result engine.CheckResult
	corruption := func(format string, args ...any) {
		const described = 100
		if result.Corruptions++; result.Corruptions <= described {
			result.Problems = append(result.Problems, engine.Problem{Corrupt: true, Text: fmt.Sprintf(format, args...)})
		}
	}
	var used []int64
	for i := range c.h.entries {
		e, err := c.entry(i)
		switch {
		case errors.Is(err, block.ErrCorrupt):
			corruption("%v", err)
		case err != nil:
			return result, err
		case e > toyZero && slices.Contains(used, e&^toyFlags):
			corruption("cluster %#x has two owners", e)
		case e > toyZero:
			used = append(used, e&^toyFlags)
		}
	}
	result.Leaks = (size-toyDataStart(c.h.entries))/toyClusterBytes - int64(len(used))
	return result, nil
}
