package main

import (
	"bytes"
	"context"
	"debug/elf"
	_ "embed"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed guest/init.sh
var initScript []byte

// wantedModules are those that the tests need; what they depend on comes along. One
// that a kernel doesn't have is built in, or the test that needs it says so.
var wantedModules = []string{"nbd", "loop", "fuse", "ext4", "crc32c_generic"}

// guestPrograms are copied with the libraries they need.
var guestPrograms = []string{"fio", "mkfs.ext4"}

// writeInitramfs writes an archive with everything a machine needs.
func writeInitramfs(ctx context.Context, path string, k kernel, testBinary string) error {
	a := newArchive()
	a.add("init", 0o755, initScript)
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "run"} {
		a.mkdir(dir)
	}
	if err := a.addFile("bin/guest.test", testBinary); err != nil {
		return err
	}
	if err := a.addBusybox(ctx); err != nil {
		return err
	}
	for _, name := range guestPrograms {
		if err := a.addProgram(ctx, name); err != nil {
			return err
		}
	}
	if err := a.addModules(ctx, k); err != nil {
		return err
	}
	return os.WriteFile(path, a.bytes(), 0o600)
}

func (a *archive) addFile(name, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	a.add(name, 0o755, b)
	return nil
}

func (a *archive) addBusybox(ctx context.Context) error {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	if err := a.addFile("bin/busybox", path); err != nil {
		return err
	}
	applets, err := exec.CommandContext(ctx, path, "--list").Output()
	if err != nil {
		return fmt.Errorf("busybox --list: %w", err)
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet != "busybox" {
			a.symlink("bin/"+applet, "busybox")
		}
	}
	a.symlink("sbin", "bin") // where the kernel looks for modprobe
	return nil
}

// addProgram adds a program and the libraries that ldd names, at their own places.
func (a *archive) addProgram(ctx context.Context, name string) error {
	path, err := exec.LookPath(name)
	if err != nil {
		return err
	}
	if err := a.addFile("bin/"+name, path); err != nil {
		return err
	}
	libraries, err := exec.CommandContext(ctx, "ldd", path).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", path, err)
	}
	for field := range strings.FieldsSeq(string(libraries)) {
		if strings.HasPrefix(field, "/") {
			if err := a.addFile(strings.TrimPrefix(field, "/"), field); err != nil {
				return err
			}
		}
	}
	return nil
}

// addModules adds the wanted modules, unpacked, and the list by which modprobe finds
// what each depends on.
func (a *archive) addModules(ctx context.Context, k kernel) error {
	files := map[string]string{} // by module name
	err := filepath.WalkDir(k.modules, func(path string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("list modules: %w", err)
	}
	var list strings.Builder
	depends := map[string][]string{}
	dir := "lib/modules/" + k.release + "/"
	for todo := slices.Clone(wantedModules); len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		if _, done := depends[name]; done || files[name] == "" {
			continue
		}
		module, err := readModule(ctx, files[name])
		if err != nil {
			return err
		}
		if depends[name], err = moduleDepends(module); err != nil {
			return fmt.Errorf("%s: %w", files[name], err)
		}
		todo = append(todo, depends[name]...)
		a.add(dir+name+".ko", 0o644, module)
	}
	for name := range depends {
		fmt.Fprintf(&list, "%s.ko:", name)
		for _, d := range closure(depends, name) {
			fmt.Fprintf(&list, " %s.ko", d)
		}
		list.WriteByte('\n')
	}
	a.add(dir+"modules.dep", 0o644, []byte(list.String()))
	return nil
}

// closure lists all that a module needs, the nearest first, as modules.dep wants it.
func closure(depends map[string][]string, name string) []string {
	var all []string
	for _, d := range depends[name] {
		for _, n := range append([]string{d}, closure(depends, d)...) {
			if _, present := depends[n]; present && !slices.Contains(all, n) {
				all = append(all, n)
			}
		}
	}
	return all
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

// archive is a cpio archive in the "newc" format, which the kernel unpacks.
type archive struct {
	buf   bytes.Buffer
	known map[string]bool
}

func newArchive() *archive { return &archive{known: map[string]bool{}} }

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	a.entry(name, 0o100000|uint32(mode.Perm()), data)
}

func (a *archive) symlink(name, target string) { a.entry(name, 0o120777, []byte(target)) }

func (a *archive) mkdir(name string) { a.entry(name, 0o040755, nil) }

// entry adds an object once, and the directories above it.
func (a *archive) entry(name string, mode uint32, data []byte) {
	if a.known[name] {
		return
	}
	if dir := filepath.Dir(name); dir != "." {
		a.mkdir(dir)
	}
	a.known[name] = true
	a.record(name, mode, data)
}

func (a *archive) record(name string, mode uint32, data []byte) {
	// magic, inode, mode, uid, gid, links, mtime, size, device and rdevice numbers,
	// length of the name with its NUL, checksum
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		len(a.known), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

// bytes ends the archive and returns it.
func (a *archive) bytes() []byte {
	a.record("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}
