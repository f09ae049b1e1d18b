package formattest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// The child process of KillProcess learns from these variables what it is and does.
const (
	childImages   = "IMGDISK_KILL_IMAGES"   // directory of the images
	childJournals = "IMGDISK_KILL_JOURNALS" // directory of the journal, "" for none
	childNames    = "IMGDISK_KILL_NAMES"    // of the chain, separated by colons
	childSize     = "IMGDISK_KILL_SIZE"     // of the disk
	childOps      = "IMGDISK_KILL_OPS"      // number of the last operation before
	childSeed     = "IMGDISK_KILL_SEED"
)

// killsPerRun is how often KillProcess kills, with and without a journal.
const killsPerRun = 25

// KillProcess kills a real process with SIGKILL, at random moments, while it writes to an
// image in a real directory, again and again. It runs the test binary again for that: the
// test that calls it must do nothing else before.
//
// With a redo journal everything that the process had been told to be written is there
// afterwards; without one, everything that was flushed.
func KillProcess(t *testing.T, f Factory) {
	f.register()
	if os.Getenv(childImages) != "" {
		fmt.Println("error", beChild(f))
		os.Exit(1)
	}
	f.counted(t, "processes killed", func(f *Figures) *atomic.Int64 { return &f.ProcessKills })
	f.noteFailure(t)
	defer WriteFigures(t)
	t.Run("journal", func(t *testing.T) { killProcesses(t, f, journalDir(t)) })
	t.Run("no journal", func(t *testing.T) { killProcesses(t, f, "") })
}

// journalDir returns a directory on tmpfs if there is one.
func journalDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "formattest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func killProcesses(t *testing.T, f Factory, journals string) {
	r := testenv.Rand(t)
	images := t.TempDir()
	fsys, err := vfs.OpenDir(images)
	if err != nil {
		t.Fatal(err)
	}
	defer fsys.Close()
	depths := f.depths()
	p := newPlayer(t, f, fsys, r, depths[min(1, len(depths)-1)])
	p.leaky = true
	p.mustClose(t)
	if journals != "" {
		dir, err := vfs.OpenDir(journals)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		p.rig.journal = &engine.JournalFile{FS: dir, Name: journalName, Epoch: 1}
	}
	played := 0
	for range f.scaled(killsPerRun) {
		child := &child{p: p, test: t.Name(), images: images, journals: journals, r: r}
		if err := child.runAndKill(); err != nil {
			t.Fatalf("child: %v", err)
		}
		played += child.completed
		p.rig.figures().ProcessKills.Add(1)
		if err := p.afterProcessKill(); err != nil {
			t.Fatalf("killed in operation %06x, %d of the child's had completed: %v", p.ops, child.completed, err)
		}
	}
	t.Logf("%d operations completed by children that were killed", played)
	if err := p.rig.open(vfs.ReadWrite); err != nil {
		t.Fatal(err)
	}
	p.finish(t)
	p.rig.checkLeftWithQEMU(t, p.m.live.bytes)
}

// afterProcessKill looks at what the child left, and takes it as what is there.
func (p *player) afterProcessKill() error {
	got, err := p.rig.inspect()
	if err != nil {
		return err
	}
	if p.rig.journal != nil {
		err = p.allowsAfterKill(got)
	} else {
		err = p.allowsAfterCrash(got)
	}
	p.inFlight = nil
	p.m = newModel(contents{bytes: got})
	return err
}

// child is a process that plays on the player's image, told and watched by its parent.
type child struct {
	p                *player
	test             string
	images, journals string
	r                *rand.Rand
	completed        int
}

// runAndKill starts the process, kills it after a random time, and tells the model what
// it has done.
func (c *child) runAndKill() error {
	name, _, _ := strings.Cut(c.test, "/")
	cmd := exec.Command(os.Args[0], "-test.run=^"+name+"$", "-test.count=1")
	seed := c.r.Uint64()
	cmd.Env = append(os.Environ(),
		childImages+"="+c.images, childJournals+"="+c.journals,
		childNames+"="+strings.Join(c.p.rig.names, ":"),
		fmt.Sprintf("%s=%d", childSize, c.p.m.size()),
		fmt.Sprintf("%s=%d", childOps, c.p.ops),
		fmt.Sprintf("%s=%d", childSeed, seed))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = c.watch(bufio.NewScanner(out), childScript(c.p.rig.f, c.p.m.size(), seed), cmd.Process)
	cmd.Process.Kill()
	io.Copy(io.Discard, out)
	cmd.Wait() // killed: its error says so
	return err
}

// watch follows what the child says, until it is killed: "ready" when the image is open,
// then "begin" and "end" around every step.
func (c *child) watch(lines *bufio.Scanner, script []op, process *os.Process) error {
	begun := 0
	for lines.Scan() {
		switch line := lines.Text(); line {
		case "ready":
			// Most steps take some ten microseconds, some wait for the disk.
			delay := time.Duration(c.r.Int64N(int64(60 * time.Millisecond)))
			time.AfterFunc(delay, func() { process.Kill() })
		case "begin":
			c.p.beginChildStep(script[begun])
			begun++
		case "end":
			c.p.endChildStep(script[begun-1])
			c.completed++
		default:
			return errors.New(line)
		}
	}
	return nil
}

func (p *player) beginChildStep(o op) {
	p.ops++
	if o.kind != opFlush {
		p.begin(p.changeOf(o))
	}
}

func (p *player) endChildStep(o op) {
	if o.kind == opFlush {
		p.m.flushed(p.m.live.clone(), len(p.m.since), true)
		return
	}
	p.noteChange(o, p.inFlight[0], nil)
}

// childScript is what the child plays; its parent knows it, too.
func childScript(f Factory, size int64, seed uint64) []op {
	s := f.shape()
	s.size = size
	const endless = 20000
	script := newScript(rand.New(rand.NewPCG(seed, seed)), s, mix{opWrite: 16, opZero: 3, opDiscard: 2, opFlush: 2}, endless)
	for i := range script {
		script[i].flags &^= block.ZeroFastOnly // the parent would not know whether it was done
	}
	return script
}

// beChild plays until it is killed. If it returns, something is wrong.
func beChild(f Factory) error {
	number := func(name string) uint64 {
		n, err := strconv.ParseUint(os.Getenv(name), 10, 64)
		if err != nil {
			panic(fmt.Sprintf("%s: %v", name, err))
		}
		return n
	}
	fsys, err := vfs.OpenDir(os.Getenv(childImages))
	if err != nil {
		return err
	}
	rig := &rig{f: f, fs: fsys, names: filepath.SplitList(os.Getenv(childNames))}
	if journals := os.Getenv(childJournals); journals != "" {
		dir, err := vfs.OpenDir(journals)
		if err != nil {
			return err
		}
		rig.journal = &engine.JournalFile{FS: dir, Name: journalName, Epoch: 1}
	}
	if err := rig.open(vfs.ReadWrite); err != nil {
		return err
	}
	fmt.Println("ready")
	p := &player{rig: rig, ops: int(number(childOps))}
	for _, o := range childScript(f, int64(number(childSize)), number(childSeed)) {
		p.ops++
		fmt.Println("begin")
		if err := p.askChild(o); err != nil {
			return err
		}
		fmt.Println("end")
	}
	select {} // it has been quick; wait to be killed
}

func (p *player) askChild(o op) error {
	if o.kind == opFlush {
		return p.rig.img.Flush()
	}
	return p.ask(o, p.changeOf(o))
}
