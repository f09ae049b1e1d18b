package formats

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// registered is filled by Register: the one place that names all formats is package
// formats/all, so that a format can be tested without the others.
var registered []Format

// aliases are other names of formats: what people call them, and what file names end with.
var aliases = map[string]string{
	"vhd": "vpc",
	"img": "raw", "dd": "raw",
}

// rawName is the format that everything is of, if it is of no other.
const rawName = "raw"

// Register adds formats, in the order in which they are probed. It is called once, by
// package all, before anything else here.
func Register(formats ...Format) { registered = append(registered, formats...) }

// All returns the registered formats in the order in which they are probed.
func All() []Format { return registered }

// Names returns the names of the registered formats, without their aliases, in the order
// of All.
func Names() []string {
	names := make([]string, len(registered))
	for i, f := range registered {
		names[i] = f.Name()
	}
	return names
}

// Lookup returns the format with a name or an alias; block.ErrInvalid if there is none.
func Lookup(name string) (Format, error) {
	for _, wanted := range []string{name, aliases[name]} {
		i := slices.IndexFunc(registered, func(f Format) bool { return f.Name() == wanted })
		if i >= 0 {
			return registered[i], nil
		}
	}
	return nil, fmt.Errorf("format %q: %w: want one of %s", name, block.ErrInvalid, strings.Join(accepted(), ", "))
}

// accepted lists what Lookup knows: names, with their aliases.
func accepted() []string {
	names := Names()
	for i, name := range names {
		var others []string
		for _, alias := range slices.Sorted(maps.Keys(aliases)) {
			if aliases[alias] == name {
				others = append(others, alias)
			}
		}
		if len(others) > 0 {
			names[i] += " (" + strings.Join(others, ", ") + ")"
		}
	}
	return names
}

// Probe says of which format an image is, by its contents; raw if nothing else fits. Only
// for images that people bring: a guest can write any header into a raw disk. An image
// that looks like several formats is block.ErrInvalid: somebody has to say which it is.
func Probe(fs vfs.FS, name string) (Format, error) {
	e, err := readEnds(fs, name)
	if err != nil {
		return nil, fmt.Errorf("probe: %w", err)
	}
	var found []Format
	for _, f := range registered {
		if f.Name() != rawName && e.looksLike(f) {
			found = append(found, f)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		if f, err := Lookup(rawName); err == nil {
			return f, nil
		}
		return nil, fmt.Errorf("%w: no known image format", block.ErrUnsupported)
	}
	var names []string
	for _, f := range found {
		names = append(names, f.Name())
	}
	return nil, fmt.Errorf("%s looks like several formats (%s): %w: its format has to be given",
		name, strings.Join(names, ", "), block.ErrInvalid)
}

// ends are what probing sees of a file.
type ends struct {
	head, tail []byte
	size       int64
}

func readEnds(fs vfs.FS, name string) (ends, error) {
	f, err := fs.Open(name, vfs.ReadOnly)
	if err != nil {
		return ends{}, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return ends{}, err
	}
	e := ends{head: make([]byte, min(size, ProbeBytes)), tail: make([]byte, min(size, ProbeTailBytes)), size: size}
	if _, err := f.ReadAt(e.head, 0); err != nil && err != io.EOF {
		return ends{}, err
	}
	if _, err := f.ReadAt(e.tail, size-int64(len(e.tail))); err != nil && err != io.EOF {
		return ends{}, err
	}
	return e, nil
}

func (e ends) looksLike(f Format) bool {
	if f.Probe(e.head, e.size) {
		return true
	}
	tail, ok := f.(TailProber)
	return ok && tail.ProbeTail(e.tail, e.size)
}
