package volumes

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// memoryWatchdog is how long one chunk, or a sync, may take before it counts as a deadlock.
const memoryWatchdog = 5 * time.Minute

// TestMemoryPressure writes more through the page cache, of a device and of a file system
// on it, than the machine has memory: the kernel must write back to make room, to servers
// that need memory themselves. No deadlock, nobody is killed for want of memory, and the
// data is right.
func TestMemoryPressure(t *testing.T) {
	on(t, "memory")
	var info unix.Sysinfo_t
	must(t, unix.Sysinfo(&info))
	total := int64(info.Totalram) * int64(info.Unit)
	t.Logf("the machine has %d MiB", total/mib)
	if total > 1024*mib {
		t.Fatal("too much memory to fill")
	}
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		dog := watchdog(t)
		defer dog.Stop()
		v, err := n.Create(t.Context(), "v", 5*total/4+128*mib, parameters)
		must(t, err)
		must(t, v.Attach(t.Context()))
		killed, pids := oomKills(t), servers(t, n)
		size := 5 * total / 4 / chunkBytes * chunkBytes
		t.Run("device", func(t *testing.T) { dirtyFile(t, dog, v.Path(), size) })
		t.Run("ext4", func(t *testing.T) { dirtyFileSystem(t, dog, v.Path(), size*9/10/chunkBytes*chunkBytes) })
		if now := oomKills(t); now != killed {
			t.Errorf("%s processes were killed for want of memory, before %s", now, killed)
		}
		if now := servers(t, n); now != pids {
			replaced(t, n, parameters["transport"], fmt.Sprintf("the servers are %s, were %s", now, pids))
		}
		must(t, v.Detach(t.Context()))
		must(t, v.Delete(t.Context()))
	})
}

// watchdog ends the machine's tests if it is neither reset nor stopped in time, and has the
// kernel say who waits for what.
func watchdog(t *testing.T) *time.Timer {
	return time.AfterFunc(memoryWatchdog, func() {
		_ = os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0) // into the kernel's log
		panic(fmt.Sprintf("%s: nothing has moved for %v: a deadlock", t.Name(), memoryWatchdog))
	})
}

// oomKills returns how many processes the kernel has killed for want of memory.
func oomKills(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/vmstat")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n)
		}
	}
	t.Fatal("/proc/vmstat doesn't say how many processes were killed")
	return ""
}

// replaced judges that there are other servers than before. One that ended by itself is an
// error. Before Linux 6.13 the kernel's nbd hangs up by itself: where a signal interrupts a
// request that it has sent a part of, as happens when the server is slow to take it, it sends
// the rest under another tag, and takes the reply for one that it never asked for ("Unexpected
// reply"). The server is replaced then, and requests are sent anew: this is not what is tested.
func replaced(t *testing.T, n *node.Node, transport, what string) {
	t.Helper()
	log, err := exec.Command("dmesg").Output()
	must(t, err)
	if transport != "nbd" || strings.Contains(n.Log(), "server ended") || !strings.Contains(string(log), "Unexpected reply") {
		t.Error(what)
		return
	}
	t.Log(what + ": the kernel hung up")
}

// servers tells the processes of all servers.
func servers(t *testing.T, n *node.Node) string {
	t.Helper()
	list, err := n.Supervisor().List(t.Context())
	must(t, err)
	var pids []string
	for _, at := range list {
		pids = append(pids, fmt.Sprint(at.PID))
	}
	return strings.Join(pids, " ")
}

// chunkBytes is written at once.
const chunkBytes = mib

// fillChunk makes a chunk's contents of its place.
func fillChunk(b []byte, off int64) {
	x := uint64(off)*0x9e3779b97f4a7c15 + 1
	for i := 0; i < len(b); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(b[i:], x)
	}
}

// dirtyFile writes whole chunks of a file or device through the page cache, one half by
// write(2) and the other through a mapping, and compares what it reads after that.
func dirtyFile(t *testing.T, dog *time.Timer, path string, size int64) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() {
		must(t, f.Truncate(size))
	}
	start, chunk := time.Now(), make([]byte, chunkBytes)
	for off := int64(0); off < size; off += chunkBytes {
		fillChunk(chunk, off)
		if off/chunkBytes%2 == 0 {
			_, err = f.WriteAt(chunk, off)
		} else {
			err = writeMapped(f, chunk, off)
		}
		if err != nil {
			t.Fatalf("write at %d: %v", off, err)
		}
		dog.Reset(memoryWatchdog)
	}
	must(t, f.Sync())
	t.Logf("%d MiB written in %v", size/mib, time.Since(start).Round(time.Second))
	must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
	got := make([]byte, chunkBytes)
	for off := int64(0); off < size; off += chunkBytes {
		fillChunk(chunk, off)
		if _, err := f.ReadAt(got, off); err != nil || !bytes.Equal(got, chunk) {
			t.Fatalf("read at %d: other bytes, or %v", off, err)
		}
		dog.Reset(memoryWatchdog)
	}
}

func writeMapped(f *os.File, b []byte, off int64) error {
	m, err := unix.Mmap(int(f.Fd()), off, len(b), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(m, b)
	return unix.Munmap(m)
}

// dirtyFileSystem does it to a file on the device.
func dirtyFileSystem(t *testing.T, dog *time.Timer, device string, size int64) {
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", device).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := t.TempDir()
	must(t, unix.Mount(device, dir, "ext4", 0, ""))
	defer func() { must(t, unix.Unmount(dir, 0)) }()
	dirtyFile(t, dog, filepath.Join(dir, "file"), size)
}
