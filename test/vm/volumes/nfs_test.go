package volumes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// nfs is the kernel's own NFS server, on the loopback interface, and its client. What
// user-space daemons would tell the kernel (whom it may serve what) is written into its
// caches beforehand.
type nfs struct{ files *node.StoreFS }

const (
	nfsDomain = "everybody"
	// exportFlags: NFSEXP_FSID, NFSEXP_NOSUBTREECHECK, NFSEXP_INSECURE_PORT; writable, and
	// root is root.
	exportFlags = 0x2000 | 0x400 | 0x2
	never       = 1<<31 - 1 // when cached answers expire, in seconds since 1970
	// graceSeconds is how long a server that starts waits for the clients that it had, before
	// it gives anybody new locks. They must find it in that time, and get theirs back: a
	// client tries to connect every 45 s in the end, and an emulated one takes its time for
	// everything.
	graceSeconds = "300"
)

// startNFS starts the server, with a file system of its own to export.
func startNFS(t *testing.T) *nfs {
	t.Helper()
	for _, module := range []string{"md5", "nfsd", "nfsv4"} {
		if out, err := exec.Command("modprobe", module).CombinedOutput(); err != nil && module != "md5" {
			t.Fatalf("modprobe %s: %v: %s", module, err, out)
		}
	}
	dir, err := os.MkdirTemp("/store", "nfs")
	must(t, err)
	files, err := node.MakeStoreFS(t.Context(), dir, 2<<30)
	must(t, err)
	if _, err := os.Stat("/proc/fs/nfsd/threads"); err != nil {
		must(t, unix.Mount("nfsd", "/proc/fs/nfsd", "nfsd", 0, ""))
	}
	s := &nfs{files}
	s.start(t)
	// There have been no clients. One that came while the server waited would be forgotten
	// at the end of that, as one that has not come back.
	s.endGrace(t)
	t.Cleanup(func() {
		s.stop(t)
		if err := files.Close(); err != nil {
			t.Errorf("the exported file system: %v", err)
		}
		os.RemoveAll(dir)
	})
	return s
}

// start has the server listen and answer. When it stops it forgets whom it may serve what.
func (s *nfs) start(t *testing.T) {
	t.Helper()
	for _, w := range []struct{ path, text string }{
		{"/proc/fs/nfsd/nfsv4gracetime", graceSeconds},
		{"/proc/fs/nfsd/versions", "-3 +4 +4.1 +4.2"},
		{"/proc/net/rpc/auth.unix.ip/channel", fmt.Sprintf("nfsd 127.0.0.1 %d %s", never, nfsDomain)},
		{"/proc/net/rpc/nfsd.export/channel", fmt.Sprintf("%s %s %d %d 65534 65534 0", nfsDomain, s.files.Path, never, exportFlags)},
		// 1 is FSID_NUM: the root of what is exported has number 0.
		{"/proc/net/rpc/nfsd.fh/channel", fmt.Sprintf("%s 1 \\x00000000 %d %s", nfsDomain, never, s.files.Path)},
		{"/proc/fs/nfsd/portlist", "tcp 2049"},
		{"/proc/fs/nfsd/threads", "4"},
	} {
		writeKernel(t, w.path, w.text)
	}
}

// stop ends the server: nobody listens any more, and what it knew of its clients is gone,
// but for their names, which lie in /var/lib/nfs/v4recovery.
func (s *nfs) stop(t *testing.T) {
	t.Helper()
	writeKernel(t, "/proc/fs/nfsd/threads", "0")
}

// endGrace has the server wait no longer for clients that it had. It returns once it
// doesn't.
func (s *nfs) endGrace(t *testing.T) {
	t.Helper()
	const path = "/proc/fs/nfsd/v4_end_grace"
	// Busy: it has waited long enough already.
	if err := os.WriteFile(path, []byte("Y\n"), 0); err != nil && !errors.Is(err, unix.EBUSY) {
		t.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		ended, err := os.ReadFile(path)
		must(t, err)
		if strings.HasPrefix(string(ended), "Y") {
			return
		}
		if time.Since(start) > node.Patience {
			t.Fatalf("%s stays %q", path, ended)
		}
	}
}

// stall has the server answer no request that changes something, and after a moment none
// at all, for some time: as many as it has threads wait in it.
func (s *nfs) stall(t *testing.T, d time.Duration) {
	t.Helper()
	must(t, s.files.Stall(t.Context(), d))
}

func writeKernel(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	if _, err := f.WriteString(text + "\n"); err != nil {
		t.Fatalf("write %q to %s: %v", text, path, err)
	}
}

// mount mounts what the server exports.
func (s *nfs) mount(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	var err error
	for range 60 { // a server that starts may refuse new clients for some time
		err = unix.Mount("127.0.0.1:/", dir, "nfs4", 0, "addr=127.0.0.1,clientaddr=127.0.0.1,vers=4.2,proto=tcp,hard,timeo=50")
		if err == nil {
			break
		}
		time.Sleep(time.Second)
	}
	must(t, err)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH)
		}
	})
	return dir
}
