package archive

import (
	"archive/tar"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Layer is a compressed layer in a file of its own.
type Layer struct {
	Path   string `json:"-"`
	Digest string `json:"digest"` // of the file, as sha256:HEX
	DiffID string `json:"diffID"` // of the tar in it, likewise
	Size   int64  `json:"size"`   // of the file, in bytes
}

// Content is what a layer has: a directory's files with their owners and modes, then Files.
// Devices, sockets and pipes of the directory are left out.
type Content struct {
	Root  string // a directory, or empty
	Files []File // in any order

	// Newest is what no file is to be younger than, if it is not zero.
	Newest time.Time
}

// File is one file that is not in a layer's directory, or replaces one that is. It belongs
// to root and is as old as the layer's Newest, or 1970.
type File struct {
	Name string      // in the image, without a slash in front
	Mode fs.FileMode // permissions, setuid and sticky bits; fs.ModeDir for a directory
	From string      // a file on this machine that has its contents
	Data []byte      // its contents, if From is empty
	Link string      // what a symbolic link names; then neither From nor Data
}

// WriteLayer makes or overwrites a layer's file, and one beside it with what OpenLayer reads.
func WriteLayer(path string, content Content) (layer Layer, err error) {
	out, err := os.Create(path)
	if err != nil {
		return layer, err
	}
	defer func() {
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
	}()
	outer, inner := sha256.New(), sha256.New()
	zip := gzip.NewWriter(io.MultiWriter(out, outer))
	w := tar.NewWriter(io.MultiWriter(zip, inner))
	if err := content.write(w); err != nil {
		return layer, err
	}
	if err := w.Close(); err != nil {
		return layer, err
	}
	if err := zip.Close(); err != nil {
		return layer, err
	}
	info, err := out.Stat()
	if err != nil {
		return layer, err
	}
	layer = Layer{
		Path: path, Size: info.Size(),
		Digest: "sha256:" + hex.EncodeToString(outer.Sum(nil)), DiffID: "sha256:" + hex.EncodeToString(inner.Sum(nil)),
	}
	description, err := json.Marshal(layer)
	if err != nil {
		return layer, err
	}
	return layer, os.WriteFile(path+".json", description, 0o644)
}

// KeptLayer returns the layer at path, and makes it if it is not there.
func KeptLayer(path string, content Content) (Layer, error) {
	layer, err := OpenLayer(path)
	if errors.Is(err, fs.ErrNotExist) {
		return WriteLayer(path, content)
	}
	return layer, err
}

// OpenLayer returns what WriteLayer has made.
func OpenLayer(path string) (Layer, error) {
	layer := Layer{Path: path}
	data, err := os.ReadFile(path + ".json")
	if err != nil {
		return layer, err
	}
	if err := json.Unmarshal(data, &layer); err != nil {
		return layer, fmt.Errorf("read %s.json: %w", path, err)
	}
	return layer, nil
}

func (c Content) write(w *tar.Writer) error {
	l := layerWriter{w, c.Root, c.Newest, map[string]bool{}, map[uint64]string{}}
	for _, f := range c.Files {
		l.replaced[path.Clean(f.Name)] = true
	}
	if c.Root != "" {
		// Sorted by name, which WalkDir promises.
		if err := filepath.WalkDir(c.Root, l.addFromRoot); err != nil {
			return err
		}
	}
	files := slices.Clone(c.Files)
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	for _, f := range files {
		if err := l.addFile(f); err != nil {
			return fmt.Errorf("%s: %w", f.Name, err)
		}
	}
	return nil
}

// layerWriter adds files to a layer's tar.
type layerWriter struct {
	w        *tar.Writer
	root     string
	newest   time.Time
	replaced map[string]bool   // names of files of the root that others replace
	linked   map[uint64]string // names by inode, of files that have several
}

func (l layerWriter) addFromRoot(path string, entry fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	name, err := filepath.Rel(l.root, path)
	if err != nil || name == "." || l.replaced[name] {
		return err
	}
	info, err := entry.Info()
	if err != nil {
		return err
	}
	var link string
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	case !info.IsDir() && !info.Mode().IsRegular():
		return nil // a container gets its own
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	l.neutral(header, name)
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().IsRegular() && st.Nlink > 1 {
		if first, ok := l.linked[st.Ino]; ok {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
			return l.w.WriteHeader(header)
		}
		l.linked[st.Ino] = name
	}
	if err := l.w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	return l.copy(path)
}

// neutral removes what differs between builds.
func (l layerWriter) neutral(header *tar.Header, name string) {
	header.Name = filepath.ToSlash(name)
	if header.Typeflag == tar.TypeDir {
		header.Name += "/"
	}
	header.Uname, header.Gname = "", ""
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	header.ModTime = header.ModTime.Truncate(time.Second)
	if !l.newest.IsZero() && header.ModTime.After(l.newest) {
		header.ModTime = l.newest
	}
	header.Format = tar.FormatPAX
}

// addFile adds one that is not of the root.
func (l layerWriter) addFile(f File) error {
	when := l.newest
	if when.IsZero() {
		when = time.Unix(0, 0)
	}
	header := &tar.Header{Name: f.Name, Mode: tarMode(f.Mode), ModTime: when.UTC().Truncate(time.Second), Format: tar.FormatPAX}
	switch {
	case f.Mode.IsDir():
		header.Typeflag = tar.TypeDir
		header.Name += "/"
		return l.w.WriteHeader(header)
	case f.Link != "":
		header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, f.Link, 0o777
		return l.w.WriteHeader(header)
	case f.From == "":
		header.Typeflag, header.Size = tar.TypeReg, int64(len(f.Data))
		if err := l.w.WriteHeader(header); err != nil {
			return err
		}
		_, err := l.w.Write(f.Data)
		return err
	}
	info, err := os.Stat(f.From)
	if err != nil {
		return err
	}
	header.Typeflag, header.Size = tar.TypeReg, info.Size()
	if err := l.w.WriteHeader(header); err != nil {
		return err
	}
	return l.copy(f.From)
}

// tarMode is a mode in the bits of POSIX.
func tarMode(mode fs.FileMode) int64 {
	bits := int64(mode.Perm())
	for flag, bit := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if mode&flag != 0 {
			bits |= bit
		}
	}
	return bits
}

func (l layerWriter) copy(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(l.w, f)
	return err
}
