package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// TestDevice_CyclesWithRandomKills attaches and detaches over and over while processes
// are killed at random: no request fails, and nothing is left. IMGDISK_CYCLES is how
// often; by default as often as fits between other tests.
func TestDevice_CyclesWithRandomKills(t *testing.T) { onDevices(t, testDevice_CyclesWithRandomKills) }

func testDevice_CyclesWithRandomKills(t *testing.T, h *harness) {
	cycles := 25
	if testing.Short() {
		cycles = 8
	}
	if n, err := strconv.Atoi(os.Getenv("IMGDISK_CYCLES")); err == nil {
		cycles = n
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Duration(cycles)*10*time.Second)
	defer cancel()
	h.ctx = ctx
	before := fuseConnections(t)
	c := &cycling{crashing: &crashing{harness: h}, rng: testenv.Rand(t), killed: map[string]int{}}
	c.startNext()
	image := h.newDisk("disk")
	for range cycles {
		c.cycle(image)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d cycles; killed: %v", cycles, c.killed)
	c.revive()
	h.checkNoDevices(image)
	c.checkNothingLeft(before)
}

// cycling attaches and detaches while processes are killed.
type cycling struct {
	*crashing
	rng     *rand.Rand
	killed  map[string]int
	written []byte // the last page
	at      int64  // and where
}

// victims are who may die at the same moment: one always survives that holds a fuse
// device, once there is one.
var victims = [][]string{
	{"server"}, {"supervisor"}, {"keeper"},
	{"server", "supervisor"}, {"server", "keeper"}, {"supervisor", "keeper"},
}

// cycle attaches, writes, reads, and detaches, and some processes are killed meanwhile.
func (c *cycling) cycle(image string) {
	c.t.Helper()
	killed := make(chan struct{})
	who, supervisor := victims[c.rng.IntN(len(victims))], c.cmd.Process.Pid
	wait := time.Duration(c.rng.IntN(250)) * time.Millisecond
	go func() {
		defer close(killed)
		time.Sleep(wait)
		for _, victim := range who {
			c.killOne(victim, supervisor, image)
		}
	}()
	at := c.persist("attach", func() (Attachment, error) { return c.client.Attach(c.ctx, request(image)) })
	c.readWrite(at.Device)
	if c.rng.IntN(2) == 0 {
		<-killed
		c.revive()
		c.readWrite(at.Device)
	}
	c.persist("detach", func() (Attachment, error) {
		err := c.client.Detach(c.ctx, image, false)
		if errors.Is(err, block.ErrNotFound) {
			err = nil // it was under way when the supervisor was killed
		}
		return Attachment{}, err
	})
	<-killed
	for _, victim := range who {
		c.killed[victim]++
	}
	c.revive()
	if left := c.devices(); left != nil {
		c.t.Errorf("left after a detach: %v", left)
	}
}

func (c *cycling) killOne(victim string, supervisor int, image string) {
	switch victim {
	case "supervisor":
		_ = unix.Kill(supervisor, unix.SIGKILL) // it lives until revive has seen it dead
	case "keeper":
		c.killKeeper()
	case "server":
		for _, pid := range pidsWith(c.t, "\x00test-server\x00image="+image+"\x00") {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// persist repeats what a client asks for until it is granted.
func (c *cycling) persist(what string, f func() (Attachment, error)) Attachment {
	c.t.Helper()
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		at, err := f()
		if err == nil {
			return at
		}
		if time.Since(start) > patience {
			c.t.Fatalf("%s: still after %v: %v", what, patience, err)
		}
		c.revive()
	}
}

// readWrite checks what was written last, and writes something else.
func (c *cycling) readWrite(device string) {
	c.t.Helper()
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		c.t.Fatalf("open %s: %v", device, err)
	}
	defer unix.Close(fd)
	page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		c.t.Fatal(err)
	}
	defer unix.Munmap(page)
	done := make(chan error, 1)
	go func() {
		for range 20 {
			if c.written != nil {
				if _, err := unix.Pread(fd, page, c.at); err != nil || !bytes.Equal(page, c.written) {
					done <- fmt.Errorf("read at %d: %v, want what was written", c.at, err)
					return
				}
			}
			c.at = c.rng.Int64N(1000) * 4096
			c.written = bytes.Repeat([]byte{byte(c.rng.IntN(256))}, 4096)
			copy(page, c.written)
			if _, err := unix.Pwrite(fd, page, c.at); err != nil {
				done <- fmt.Errorf("write at %d: %w", c.at, err)
				return
			}
		}
		done <- nil
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				c.t.Error(err)
			}
			return
		case <-time.After(50 * time.Millisecond):
			c.revive() // requests wait for it
		}
	}
}

// checkNothingLeft checks, after everything was detached, that the supervisor ends and
// leaves neither processes nor mounts nor connections, and which files.
func (c *cycling) checkNothingLeft(connections int) {
	c.t.Helper()
	if err := Stop(c.ctx, c.stateDir); err != nil {
		c.t.Error(err)
	}
	<-c.ended
	c.eventually("the end of processes", func() error {
		if pids := pidsWith(c.t, c.dir); len(pids) > 0 {
			return fmt.Errorf("processes %v run", pids)
		}
		return nil
	})
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || bytes.Contains(mounts, []byte(c.dir)) || bytes.Contains(mounts, []byte(" csi-imgdisk ")) {
		c.t.Errorf("mounts are left (%v):\n%s", err, mounts)
	}
	// Others may use FUSE meanwhile; what this test has left stays, without a device.
	c.eventually("as few FUSE connections as before, or as devices", func() error {
		devices, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
		if now := fuseConnections(c.t); now > connections && now > len(devices) {
			return fmt.Errorf("%d FUSE connections, before: %d; loop devices: %v, %v", now, connections, devices, err)
		}
		return nil
	})
	var files []string
	err = filepath.WalkDir(c.stateDir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && !entry.IsDir() {
			files = append(files, strings.TrimPrefix(path, c.stateDir))
		}
		return err
	})
	files = slices.DeleteFunc(files, func(name string) bool {
		return slices.Contains([]string{"/supervisor.lock", "/supervisor.log", "/keeper/keeper.lock", "/keeper/keeper.log"}, name)
	})
	if err != nil || len(files) > 0 {
		c.t.Errorf("files are left: %v, %v", files, err)
	}
	if dirs, err := os.ReadDir(filepath.Join(c.stateDir, "attachments")); err != nil || len(dirs) > 0 {
		c.t.Errorf("directories are left: %v, %v", dirs, err)
	}
}

// pidsWith returns the processes with something in their arguments, each of which a zero
// byte ends; without this one.
func pidsWith(t *testing.T, what string) (pids []int) {
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Error(err)
	}
	for _, path := range paths {
		args, err := os.ReadFile(path)
		pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
		if err == nil && pid != os.Getpid() && bytes.Contains(args, []byte(what)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// fuseConnections returns how many connections the kernel has.
func fuseConnections(t *testing.T) int {
	t.Helper()
	fs, err := unix.Fsopen("fusectl", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return 0 // no FUSE
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat(root, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	dir := os.NewFile(uintptr(fd), "fusectl")
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}
