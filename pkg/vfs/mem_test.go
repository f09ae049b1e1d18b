package vfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const sector = 512

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t testing.TB, fsys vfs.FS, name string) vfs.File {
	t.Helper()
	f, err := fsys.Create(name)
	must(t, err)
	return f
}

// fill writes n sectors of c at a sector.
func fill(t testing.TB, f vfs.File, c byte, at, n int64) {
	t.Helper()
	_, err := f.WriteAt(bytes.Repeat([]byte{c}, int(n*sector)), at*sector)
	must(t, err)
}

func readAll(t testing.TB, fsys vfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	must(t, err)
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

// letters describes a file by one letter per sector, "." for zeroes; a last sector that
// is not whole adds its length. A sector of mixed bytes has the letters of its runs.
func letters(p []byte) string {
	var out strings.Builder
	for s := range slices.Chunk(p, sector) {
		runs := slices.Compact(slices.Clone(s))
		text := strings.ReplaceAll(string(runs), "\x00", ".")
		if len(runs) > 1 {
			text = "(" + text + ")"
		}
		out.WriteString(text)
		if len(s) < sector {
			fmt.Fprintf(&out, "%d", len(s))
		}
	}
	return out.String()
}

// outcomes returns all results of describe over many crashes, sorted.
func outcomes(t testing.TB, m *vfs.Mem, r *rand.Rand, describe func(*vfs.Mem) string) []string {
	t.Helper()
	seen := make(map[string]bool)
	for range 3000 {
		seen[describe(m.Crash(r))] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

func wantOutcomes(t testing.TB, got []string, want ...string) {
	t.Helper()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("a crash leaves\n\t%q, want\n\t%q", got, want)
	}
}

// Each case starts with a durable file of three sectors "aaa".
func TestMemCrash_Contents(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, f vfs.File)
		want []string
	}{
		{"nothing", func(*testing.T, vfs.File) {}, []string{"aaa"}},
		{"one sector", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 1, 1)
		}, []string{"aaa", "aba"}},
		{"two sectors are independent", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 0, 2)
		}, []string{"aaa", "aba", "baa", "bba"}},
		{"every version of a sector", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 0, 1)
			fill(t, f, 'c', 0, 1)
		}, []string{"aaa", "baa", "caa"}},
		{"only the newest four", func(t *testing.T, f vfs.File) {
			for c := byte('b'); c < 'h'; c++ {
				fill(t, f, c, 0, 1)
			}
		}, []string{"aaa", "daa", "eaa", "faa", "gaa"}},
		{"no sector is torn", func(t *testing.T, f vfs.File) {
			_, err := f.WriteAt(bytes.Repeat([]byte{'b'}, 200), 100)
			must(t, err)
		}, []string{"aaa", "(aba)aa"}},
		{"parts of a sector come in order", func(t *testing.T, f vfs.File) {
			_, err := f.WriteAt([]byte("b"), 0)
			must(t, err)
			_, err = f.WriteAt([]byte("c"), 511)
			must(t, err)
		}, []string{"aaa", "(ba)aa", "(bac)aa"}},
		{"sync", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 0, 3)
			must(t, f.Sync())
		}, []string{"bbb"}},
		{"sync, then more", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 0, 2)
			must(t, f.Sync())
			fill(t, f, 'c', 1, 1)
		}, []string{"bba", "bca"}},
		{"punch", func(t *testing.T, f vfs.File) {
			must(t, f.PunchHole(sector, sector))
		}, []string{"aaa", "a.a"}},
		{"punch part of a sector", func(t *testing.T, f vfs.File) {
			must(t, f.PunchHole(sector+1, sector-1))
		}, []string{"aaa", "a(a.)a"}},
		{"write after punch", func(t *testing.T, f vfs.File) {
			must(t, f.PunchHole(0, sector))
			fill(t, f, 'b', 0, 1)
		}, []string{"aaa", ".aa", "baa"}},
		{"punch of unsynced", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 0, 1)
			must(t, f.PunchHole(0, sector))
		}, []string{"aaa", "baa", ".aa"}},
		{"punch, sync", func(t *testing.T, f vfs.File) {
			must(t, f.PunchHole(0, 3*sector))
			must(t, f.Sync())
		}, []string{"..."}},
		{"grow by truncate", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(5*sector))
		}, []string{"aaa", "aaa.", "aaa.."}},
		{"grow by allocate", func(t *testing.T, f vfs.File) {
			must(t, f.Allocate(0, 4*sector))
		}, []string{"aaa", "aaa."}},
		{"grow by write", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 3, 1)
		}, []string{"aaa", "aaa.", "aaab"}},
		{"grow by part of a sector", func(t *testing.T, f vfs.File) {
			_, err := f.WriteAt([]byte("b"), 3*sector)
			must(t, err)
		}, []string{"aaa", "aaa.1", "aaab1"}},
		{"shrink", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(sector))
		}, []string{"aaa", "aa.", "a.a", "a..", "a"}},
		{"shrink, sync", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(sector))
			must(t, f.Sync())
		}, []string{"a"}},
		{"shrink into a sector", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(2*sector+100))
		}, []string{"aaa", "aa(a.)", "aaa100"}},
		{"shrink and grow, sync", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(sector/2))
			must(t, f.Truncate(3*sector))
			must(t, f.Sync())
		}, []string{"(a.).."}},
		{"shrink, sync, grow", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(sector))
			must(t, f.Sync())
			must(t, f.Truncate(2*sector))
		}, []string{"a", "a."}},
		{"what was cut off unsynced never returns", func(t *testing.T, f vfs.File) {
			must(t, f.Truncate(4*sector))
			must(t, f.Sync())
			fill(t, f, 'b', 3, 1)
			must(t, f.Truncate(3*sector))
			must(t, f.Truncate(4*sector))
			must(t, f.Sync())
			must(t, f.Truncate(5*sector))
		}, []string{"aaa.", "aaa.."}},
		{"what was cut off unsynced never returns, even in between", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 3, 1)
			must(t, f.Truncate(3*sector))
			must(t, f.Truncate(4*sector))
		}, []string{"aaa", "aaa."}},
		{"a cut within a sector forgets the unsynced tail only", func(t *testing.T, f vfs.File) {
			fill(t, f, 'b', 2, 1)
			must(t, f.Truncate(2*sector+1))
			must(t, f.Truncate(3*sector))
		}, []string{"aaa", "aa(b.)", "aaa1", "aab1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := vfs.NewMem()
			f := create(t, m, "f")
			fill(t, f, 'a', 0, 3)
			must(t, f.Sync())
			must(t, m.SyncDir("."))
			c.do(t, f)
			got := outcomes(t, m, testenv.Rand(t), func(m *vfs.Mem) string { return letters(readAll(t, m, "f")) })
			wantOutcomes(t, got, c.want...)
		})
	}
}

// tree describes all names below a directory, with what is in files.
func tree(t testing.TB, fsys vfs.FS, dir string) string {
	t.Helper()
	entries, err := fsys.ReadDir(dir)
	must(t, err)
	var list []string
	for _, e := range entries {
		path := e.Name()
		if dir != "." {
			path = dir + "/" + path
		}
		if e.IsDir() {
			list = append(list, e.Name()+"{"+tree(t, fsys, path)+"}")
		} else {
			list = append(list, e.Name()+"="+letters(readAll(t, fsys, path)))
		}
	}
	return strings.Join(list, " ")
}

// Each case starts with durable a=A, b=B and the empty directory d.
func TestMemCrash_Names(t *testing.T) {
	put := func(t *testing.T, m *vfs.Mem, name string, c byte) {
		f := create(t, m, name)
		fill(t, f, c, 0, 1)
		must(t, f.Sync())
		must(t, f.Close())
	}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, m *vfs.Mem)
		want []string
	}{
		{"nothing", func(*testing.T, *vfs.Mem) {}, []string{"a=A b=B d{}"}},
		{"create", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "c", 'C')
		}, []string{"a=A b=B d{}", "a=A b=B c=C d{}"}},
		{"create, sync", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "c", 'C')
			must(t, m.SyncDir("."))
		}, []string{"a=A b=B c=C d{}"}},
		{"create, sync of another directory", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "c", 'C')
			must(t, m.SyncDir("d"))
		}, []string{"a=A b=B d{}", "a=A b=B c=C d{}"}},
		{"two changes are independent", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "c", 'C')
			must(t, m.Remove("a"))
		}, []string{"a=A b=B d{}", "a=A b=B c=C d{}", "b=B d{}", "b=B c=C d{}"}},
		{"remove, create again", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Remove("a"))
			put(t, m, "a", 'X')
		}, []string{"a=A b=B d{}", "b=B d{}", "a=X b=B d{}"}},
		{"replace is atomic", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "b"))
		}, []string{"a=A b=B d{}", "b=A d{}"}},
		{"write new, rename", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "new", 'X')
			must(t, m.Rename("new", "a"))
		}, []string{"a=A b=B d{}", "a=A b=B d{} new=X", "a=X b=B d{}"}},
		{"write new without sync, rename, sync directory", func(t *testing.T, m *vfs.Mem) {
			f := create(t, m, "new")
			fill(t, f, 'X', 0, 1)
			must(t, m.Rename("new", "a"))
			must(t, m.SyncDir("."))
		}, []string{"a= b=B d{}", "a=. b=B d{}", "a=X b=B d{}"}},
		{"a name that was taken over from a file that moved away", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "c"))
			put(t, m, "new", 'X')
			must(t, m.Rename("new", "a"))
		}, []string{"a=A b=B d{}", "b=B c=A d{}", "a=A b=B d{} new=X", "b=B c=A d{} new=X", "a=X b=B c=A d{}"}},
		{"move is atomic", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "d/a"))
		}, []string{"a=A b=B d{}", "b=B d{a=A}"}},
		{"move, sync of where from", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "d/a"))
			must(t, m.SyncDir("."))
		}, []string{"b=B d{a=A}"}},
		{"move, sync of where to", func(t *testing.T, m *vfs.Mem) {
			put(t, m, "c", 'C')
			must(t, m.Rename("c", "d/c"))
			put(t, m, "e", 'E')
			must(t, m.SyncDir("d"))
		}, []string{"a=A b=B d{c=C}", "a=A b=B d{c=C} e=E"}},
		{"a new directory vanishes with its contents", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Mkdir("n"))
			put(t, m, "n/f", 'F')
			must(t, m.SyncDir("n"))
		}, []string{"a=A b=B d{}", "a=A b=B d{} n{f=F}"}},
		{"nothing is moved into what may vanish", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Mkdir("n"))
			must(t, m.Rename("a", "n/a"))
		}, []string{"a=A b=B d{}", "a=A b=B d{} n{}", "b=B d{} n{a=A}"}},
		{"sync of a new directory that something was moved into", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Mkdir("n"))
			must(t, m.Mkdir("n/o"))
			must(t, m.Rename("a", "n/o/a"))
			must(t, m.SyncDir("n/o"))
		}, []string{"b=B d{} n{o{a=A}}"}},
		{"a directory is removed only when empty", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "d/a"))
			must(t, m.SyncDir("d"))
			must(t, m.Rename("d/a", "a2"))
			must(t, m.Remove("d"))
		}, []string{"b=B d{a=A}", "a2=A b=B d{}", "a2=A b=B"}},
		{"sync of a removal takes along what emptied the directory", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Rename("a", "d/a"))
			must(t, m.SyncDir("d"))
			must(t, m.Mkdir("n"))
			must(t, m.SyncDir("."))
			must(t, m.Rename("d/a", "n/a"))
			must(t, m.Remove("d"))
			must(t, m.SyncDir("."))
		}, []string{"b=B n{a=A}"}},
		{"directories do not swallow one another", func(t *testing.T, m *vfs.Mem) {
			must(t, m.Mkdir("e"))
			must(t, m.SyncDir("."))
			must(t, m.Rename("d", "e/d"))
			must(t, m.Rename("e/d", "d"))
			must(t, m.Rename("e", "d/e"))
		}, []string{"a=A b=B d{} e{}", "a=A b=B e{d{}}", "a=A b=B d{e{}}"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := vfs.NewMem()
			put(t, m, "a", 'A')
			put(t, m, "b", 'B')
			must(t, m.Mkdir("d"))
			must(t, m.SyncDir("."))
			c.do(t, m)
			r := testenv.Rand(t)
			describe := func(m *vfs.Mem) string { return tree(t, m, ".") }
			wantOutcomes(t, outcomes(t, m, r, describe), c.want...)
			wantOutcomes(t, outcomes(t, m.Clone(), r, describe), c.want...)
		})
	}
}

// fileModel is what a crash may leave of a file, kept the simple way: every state since
// the last sync as a whole.
type fileModel struct {
	states [][]byte // the synced one, then all since
}

func (f *fileModel) live() []byte { return f.states[len(f.states)-1] }

func (f *fileModel) push(p []byte) { f.states = append(f.states, p) }

func (f *fileModel) truncate(size int64) {
	next := make([]byte, size)
	copy(next, f.live())
	for _, unsynced := range f.states[1:] {
		if size < int64(len(unsynced)) {
			clear(unsynced[size:])
		}
	}
	f.push(next)
}

// check returns why a crash cannot have left p, or "".
func (f *fileModel) check(p []byte) string {
	low, high := len(f.live()), 0
	for _, s := range f.states {
		low, high = min(low, len(s)), max(high, len(s))
	}
	if len(p) < low || len(p) > high {
		return fmt.Sprintf("its length is %d, which was always within [%d, %d]", len(p), low, high)
	}
	for off := 0; off < len(p); off += sector {
		n := min(sector, len(p)-off)
		possible := slices.ContainsFunc(f.states, func(s []byte) bool {
			padded := make([]byte, n)
			if off < len(s) {
				copy(padded, s[off:])
			}
			return bytes.Equal(padded, p[off:off+n])
		})
		if !possible {
			return fmt.Sprintf("the sector at %d never was like that", off)
		}
	}
	return ""
}

// TestMemCrash_Model checks crashes of random histories against fileModel.
func TestMemCrash_Model(t *testing.T) {
	r := testenv.Rand(t)
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	const limit = 40 << 10
	for range rounds {
		m := vfs.NewMem()
		f := create(t, m, "f")
		must(t, m.SyncDir("."))
		model := fileModel{states: [][]byte{nil}}
		for range 60 {
			off, n := r.Int64N(limit), 1+r.Int64N(8<<10)
			switch r.IntN(10) {
			case 0:
				must(t, f.Sync())
				model.states = [][]byte{slices.Clone(model.live())}
			case 1, 2:
				must(t, f.Truncate(off))
				model.truncate(off)
			case 3, 4:
				must(t, f.PunchHole(off, n))
				next := slices.Clone(model.live())
				clear(next[min(off, int64(len(next))):min(off+n, int64(len(next)))])
				model.push(next)
			default:
				p := bytes.Repeat([]byte{byte(r.IntN(256))}, int(n))
				_, err := f.WriteAt(p, off)
				must(t, err)
				next := make([]byte, max(off+n, int64(len(model.live()))))
				copy(next, model.live())
				copy(next[off:], p)
				model.push(next)
			}
			if !bytes.Equal(readAll(t, m, "f"), model.live()) {
				t.Fatal("the live file is not the model's")
			}
			crashed := m.Crash(r)
			if why := model.check(readAll(t, crashed, "f")); why != "" {
				t.Fatalf("after a crash: %s", why)
			}
			checkDurable(t, crashed, r)
		}
	}
}

// checkDurable makes sure that another crash changes nothing, and that nothing is hidden
// past the end.
func checkDurable(t *testing.T, m *vfs.Mem, r *rand.Rand) {
	t.Helper()
	c := m.Clone()
	f, err := c.Open("f", vfs.ReadWrite)
	must(t, err)
	was, err := f.Size()
	must(t, err)
	must(t, f.Truncate(was+64<<10))
	if tail := readAll(t, c, "f")[was:]; len(bytes.Trim(tail, "\x00")) > 0 {
		t.Fatal("a file that grew after a crash shows what was cut off")
	}
	if again := m.Crash(r); !bytes.Equal(readAll(t, again, "f"), readAll(t, m, "f")) {
		t.Fatal("a second crash found something that was not durable")
	}
}

// nameModel knows where each file, told apart by its contents, has been.
type nameModel struct {
	at        map[string]string          // file -> its name now
	beenAt    map[string]map[string]bool // file -> its names since everything was synced
	durable   map[string]bool            // files that a crash cannot lose
	dirs      []string
	dirsMoved bool // since everything was synced: files may have more names than beenAt knows
}

// TestMemCrash_NamesModel renames, creates and removes at random. No crash may lose or
// double a file, and what SyncDir promised holds.
func TestMemCrash_NamesModel(t *testing.T) {
	r := testenv.Rand(t)
	rounds := 150
	if testing.Short() {
		rounds = 20
	}
	for range rounds {
		m := vfs.NewMem()
		model := &nameModel{at: map[string]string{}, beenAt: map[string]map[string]bool{}, durable: map[string]bool{}, dirs: []string{"."}}
		for step := range 50 {
			model.step(t, m, r, step)
			model.check(t, m.Crash(r))
			if step%10 == 9 {
				model.checkSyncDir(t, m, r)
			}
			if step%25 == 24 {
				model.syncAll(t, m, r)
			}
		}
	}
}

func join(dir, name string) string { return strings.TrimPrefix(dir+"/"+name, "./") }

func (n *nameModel) step(t *testing.T, m *vfs.Mem, r *rand.Rand, step int) {
	dir := n.dirs[r.IntN(len(n.dirs))]
	name := join(dir, string(rune('p'+r.IntN(4))))
	from := join(n.dirs[r.IntN(len(n.dirs))], string(rune('p'+r.IntN(4))))
	switch r.IntN(6) {
	case 0:
		sub := join(dir, fmt.Sprintf("d%d", step))
		if len(n.dirs) < 8 {
			must(t, m.Mkdir(sub))
			n.dirs = append(n.dirs, sub)
		}
	case 1:
		if dir != "." && m.Remove(dir) == nil {
			n.dirs = slices.DeleteFunc(n.dirs, func(d string) bool { return d == dir })
		}
	case 2:
		if m.Remove(name) == nil {
			n.gone(name)
		}
	case 3:
		n.moveDir(m, dir, join(n.dirs[r.IntN(len(n.dirs))], fmt.Sprintf("d%d", step)))
	case 4:
		if m.Rename(from, name) == nil && from != name {
			n.gone(name)
			n.move(from, name)
		}
	default:
		f, err := m.Create(name)
		if err != nil {
			return
		}
		id := fmt.Sprintf("%d in %s", step, name)
		_, err = f.WriteAt([]byte(id), 0)
		must(t, err)
		must(t, f.Sync())
		n.at[id], n.beenAt[id] = name, map[string]bool{name: true}
	}
}

func (n *nameModel) gone(name string) {
	for id, at := range n.at {
		if at == name {
			delete(n.at, id)
			delete(n.durable, id)
		}
	}
}

func (n *nameModel) move(from, to string) {
	for id, at := range n.at {
		if at == from {
			n.at[id] = to
			n.beenAt[id][to] = true
		}
	}
}

func (n *nameModel) moveDir(m *vfs.Mem, from, to string) {
	if from == "." || m.Rename(from, to) != nil {
		return
	}
	renamed := func(path string) string {
		if path == from || strings.HasPrefix(path, from+"/") {
			return to + path[len(from):]
		}
		return path
	}
	for i, d := range n.dirs {
		n.dirs[i] = renamed(d)
	}
	for id, at := range n.at {
		n.at[id] = renamed(at)
	}
	n.dirsMoved = true
}

// found returns all files below dir: their contents and names.
func found(t *testing.T, m *vfs.Mem, dir string, visit func(id, name string)) {
	t.Helper()
	entries, err := m.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		name := join(dir, e.Name())
		if e.IsDir() {
			found(t, m, name, visit)
		} else {
			visit(string(readAll(t, m, name)), name)
		}
	}
}

func (n *nameModel) check(t *testing.T, crashed *vfs.Mem) {
	t.Helper()
	seen := make(map[string]string)
	found(t, crashed, ".", func(id, name string) {
		if other, double := seen[id]; double {
			t.Fatalf("file %q is both %s and %s", id, other, name)
		}
		seen[id] = name
		if !n.dirsMoved && !n.beenAt[id][name] {
			t.Fatalf("file %q is %s, which was never its name", id, name)
		}
	})
	for id := range n.durable {
		if _, ok := seen[id]; !ok {
			t.Fatalf("file %q is lost; its name was %s and it was never removed", id, n.at[id])
		}
	}
}

// checkSyncDir syncs a random path from the root down: then a crash cannot change what
// is in any directory on it.
func (n *nameModel) checkSyncDir(t *testing.T, m *vfs.Mem, r *rand.Rand) {
	t.Helper()
	dir := n.dirs[r.IntN(len(n.dirs))]
	must(t, m.SyncDir("."))
	for i, c := range dir {
		if c == '/' {
			must(t, m.SyncDir(dir[:i]))
		}
	}
	must(t, m.SyncDir(dir))
	crashed := m.Crash(r)
	names := func(m *vfs.Mem) (list []string) {
		entries, err := m.ReadDir(dir)
		must(t, err)
		for _, e := range entries {
			list = append(list, e.Name())
		}
		return list
	}
	if got, want := names(crashed), names(m); !slices.Equal(got, want) {
		t.Fatalf("%s was synced with %q, a crash left %q", dir, want, got)
	}
}

func (n *nameModel) syncAll(t *testing.T, m *vfs.Mem, r *rand.Rand) {
	t.Helper()
	for _, dir := range n.dirs {
		must(t, m.SyncDir(dir))
	}
	for id, at := range n.at {
		n.durable[id] = true
		n.beenAt[id] = map[string]bool{at: true}
	}
	n.dirsMoved = false
	if got, want := tree(t, m.Crash(r), "."), tree(t, m, "."); got != want {
		t.Fatalf("everything was synced, a crash left\n\t%s, want\n\t%s", got, want)
	}
}

func TestMemCrash_SameSeedSameResult(t *testing.T) {
	m := vfs.NewMem()
	for _, name := range []string{"a", "b", "c", "d"} {
		f := create(t, m, name)
		fill(t, f, name[0], 0, 100)
		must(t, f.Truncate(70*sector))
	}
	for seed := range uint64(50) {
		one := tree(t, m.Crash(rand.New(rand.NewPCG(seed, 1))), ".")
		two := tree(t, m.Clone().Crash(rand.New(rand.NewPCG(seed, 1))), ".")
		if one != two {
			t.Fatalf("seed %d gave\n\t%s and\n\t%s", seed, one, two)
		}
	}
}

// What happens to a file system changes neither its clones nor its crashes, and back.
func TestMem_CopiesAreIndependent(t *testing.T) {
	m := vfs.NewMem()
	f := create(t, m, "f")
	fill(t, f, 'a', 0, 20)
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	must(t, f.Lock(vfs.LockWrite))
	copies := []*vfs.Mem{m.Crash(testenv.Rand(t)), m.Clone()}
	fill(t, f, 'b', 0, 20)
	must(t, f.Sync())
	must(t, m.Mkdir("d"))
	for i, c := range copies {
		if got := tree(t, c, "."); got != "f="+strings.Repeat("a", 20) {
			t.Errorf("copy %d holds %s", i, got)
		}
		g, err := c.Open("f", vfs.ReadWrite)
		must(t, err)
		must(t, g.Lock(vfs.LockWrite))
		fill(t, g, 'c', 0, 20)
		must(t, g.Sync())
		must(t, c.Remove("f"))
	}
	if got := tree(t, m, "."); got != "d{} f="+strings.Repeat("b", 20) {
		t.Errorf("the original holds %s", got)
	}
}

// A killed process's unsynced writes are seen by the next, and still not durable.
func TestMemClone_KeepsUnsyncedUndurable(t *testing.T) {
	m := vfs.NewMem()
	f := create(t, m, "f")
	fill(t, f, 'a', 0, 1)
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	fill(t, f, 'b', 0, 1)
	c := m.Clone()
	if got := tree(t, c, "."); got != "f=b" {
		t.Errorf("the clone holds %s", got)
	}
	describe := func(m *vfs.Mem) string { return tree(t, m, ".") }
	r := testenv.Rand(t)
	wantOutcomes(t, outcomes(t, c, r, describe), "f=a", "f=b")
	g, err := c.Open("f", vfs.ReadWrite)
	must(t, err)
	fill(t, g, 'c', 0, 1)
	wantOutcomes(t, outcomes(t, c, r, describe), "f=a", "f=b", "f=c")
	wantOutcomes(t, outcomes(t, m, r, describe), "f=a", "f=b")
}

func TestMem_Capacity(t *testing.T) {
	m := vfs.NewMem()
	m.SetCapacity(4*4096 + 100)
	f := create(t, m, "f")
	must(t, f.Truncate(1<<40))
	p := make([]byte, 6*4096)
	if n, err := f.WriteAt(p, 100); n != 4*4096-100 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write more than fits: %d, %v", n, err)
	}
	if n, err := f.WriteAt(p[:4096], 1<<30); n != 0 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write on a full store: %d, %v", n, err)
	}
	if _, err := f.WriteAt(p[:4*4096], 0); err != nil {
		t.Errorf("overwrite on a full store: %v", err)
	}
	if err := f.Allocate(0, 5*4096); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("allocate on a full store: %v", err)
	}
	free := func() int64 {
		u, err := m.Usage()
		must(t, err)
		return u.FreeBytes / 4096
	}
	for _, c := range []struct {
		name string
		do   func() error
		want int64
	}{
		{"full", func() error { return nil }, 0},
		{"punch a page and two halves", func() error { return f.PunchHole(2048, 8192) }, 1},
		{"allocate it", func() error { return f.Allocate(4096, 100) }, 0},
		{"truncate to one", func() error { return f.Truncate(4096) }, 3},
		{"another file", func() error {
			g, err := m.Create("g")
			if err == nil {
				_, err = g.WriteAt(p[:1], 1<<40)
			}
			return errors.Join(err, g.Close())
		}, 2},
		{"remove while open", func() error { return m.Remove("f") }, 2},
		{"close", f.Close, 3},
		{"replace", func() error {
			h, err := m.Create("h")
			return errors.Join(err, h.Close(), m.Rename("h", "g"))
		}, 4},
	} {
		must(t, c.do())
		if got := free(); got != c.want {
			t.Errorf("%s: %d pages free, want %d", c.name, got, c.want)
		}
	}
}

// A file system of terabytes costs next to nothing.
func TestMem_Sparse(t *testing.T) {
	m := vfs.NewMem()
	f := create(t, m, "f")
	must(t, f.Allocate(0, 4<<40))
	fill(t, f, 'a', 1<<30, 1)
	must(t, f.PunchHole(1<<40, 1<<40))
	n, err := f.AllocatedBytes()
	must(t, err)
	if n != 3<<40 {
		t.Errorf("%d bytes allocated, want %d", n, int64(3<<40))
	}
	start, end, err := f.NextData(1)
	if start != sector<<30 || end != start+4096 || err != nil {
		t.Errorf("next data [%d, %d), %v", start, end, err)
	}
	must(t, f.Sync())
	must(t, m.SyncDir("."))
	g, err := m.Crash(testenv.Rand(t)).Open("f", vfs.ReadOnly)
	must(t, err)
	if n, err = g.AllocatedBytes(); n != 3<<40 || err != nil {
		t.Errorf("after a crash %d bytes are allocated, %v; want %d", n, err, int64(3<<40))
	}
}

func TestMem_ReadDoesNotAllocate(t *testing.T) {
	f := create(t, vfs.NewMem(), "f")
	fill(t, f, 'a', 0, 64)
	p := make([]byte, 4096)
	if n := testing.AllocsPerRun(100, func() { f.ReadAt(p, 4096) }); n != 0 {
		t.Errorf("ReadAt allocates %v times", n)
	}
}
