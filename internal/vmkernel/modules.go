package vmkernel

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Modules are a kernel's, unpacked, by name.
type Modules struct {
	release string
	content map[string][]byte
	depends map[string][]string // what each needs directly
}

// ReadModules reads some modules of a kernel and what they depend on. It leaves out those that the
// kernel does not have, which may be built in. It needs busybox.
func (k Kernel) ReadModules(ctx context.Context, wanted []string) (Modules, error) {
	m := Modules{k.Release, map[string][]byte{}, map[string][]string{}}
	paths, err := k.modulePaths()
	if err != nil {
		return m, err
	}
	for todo := slices.Clone(wanted); len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if m.content[name] != nil || paths[name] == "" {
			continue
		}
		if m.content[name], err = readModule(ctx, paths[name]); err != nil {
			return m, err
		}
		if m.depends[name], err = moduleDepends(m.content[name]); err != nil {
			return m, fmt.Errorf("%s: %w", paths[name], err)
		}
		todo = append(todo, m.depends[name]...)
	}
	return m, nil
}

// modulePaths returns the files of all modules, by name.
func (k Kernel) modulePaths() (map[string]string, error) {
	paths := map[string]string{}
	err := filepath.WalkDir(k.Modules, func(path string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil {
			paths[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	return paths, nil
}

// Names are those of all modules that were read, sorted.
func (m Modules) Names() []string { return slices.Sorted(maps.Keys(m.content)) }

// Files returns some modules, those they need, and the list by which modprobe finds
// what each depends on, by path in a root file system.
func (m Modules) Files(names []string) map[string][]byte {
	dir := "lib/modules/" + m.release + "/"
	files := map[string][]byte{}
	var list strings.Builder
	for _, name := range names {
		if m.content[name] == nil {
			continue
		}
		for _, n := range append([]string{name}, closure(m.depends, name)...) {
			file := dir + n + ".ko"
			if files[file] != nil {
				continue
			}
			files[file] = m.content[n]
			fmt.Fprintf(&list, "%s.ko:", n)
			for _, d := range closure(m.depends, n) {
				fmt.Fprintf(&list, " %s.ko", d)
			}
			list.WriteByte('\n')
		}
	}
	files[dir+"modules.dep"] = []byte(list.String())
	return files
}

// closure lists all that a module needs, in the order of modules.dep: each before what it
// needs itself.
func closure(depends map[string][]string, name string) []string {
	var deepest []string
	var visit func(string)
	visit = func(name string) {
		for _, d := range depends[name] {
			if _, present := depends[d]; present && !slices.Contains(deepest, d) {
				visit(d)
				deepest = append(deepest, d)
			}
		}
	}
	visit(name)
	slices.Reverse(deepest)
	return deepest
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	if !strings.HasSuffix(path, ".xz") {
		return os.ReadFile(path)
	}
	out, err := exec.CommandContext(ctx, "busybox", "xzcat", path).Output()
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", path, err)
	}
	return out, nil
}

// moduleDepends reads the names of the modules that a module needs directly.
func moduleDepends(module []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(list) > 0 {
			return strings.Split(strings.ReplaceAll(string(list), "-", "_"), ","), nil
		}
	}
	return nil, nil
}
