package filter

import (
	"encoding/binary"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
)

// A block server whose volume is limited keeps the limit with many requests in flight,
// answers all of them, and has no stall to report, although each waits for seconds: its
// image does not.
func TestLimiter_BehindBlockServer(t *testing.T) {
	const depth, reads, size = 32, 60, 4096
	meter := NewMeter(&fakeDevice{sizeBytes: 1 << 20})
	limiter := NewLimiter(meter)
	limiter.Set(Limits{IOPS: MinIOPS})
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	kernel, sock := os.NewFile(uintptr(fds[0]), "kernel"), os.NewFile(uintptr(fds[1]), "server")
	defer kernel.Close()
	defer sock.Close()
	server := nbdlocal.NewServer(limiter, nbdlocal.Options{})
	served := make(chan error, 1)
	go func() { served <- server.ServeConn(t.Context(), sock) }()

	start := time.Now()
	for i := range uint64(depth) {
		sendRead(t, kernel, i, size)
	}
	reply := make([]byte, replyBytes+size)
	for i := range uint64(reads) {
		if _, err := io.ReadFull(kernel, reply); err != nil {
			t.Fatal(err)
		}
		if errno := binary.BigEndian.Uint32(reply[4:]); errno != 0 {
			t.Fatalf("a read failed with %d", errno)
		}
		if i == depth/2 { // the rest need not take the test's time
			if took := time.Since(start); took < 1400*time.Millisecond {
				t.Errorf("%d reads at %d a second took %v", i, MinIOPS, took)
			}
			limiter.Set(Limits{IOPS: 100 * MinIOPS})
		}
		if i+depth < reads {
			sendRead(t, kernel, i+depth, size)
		}
	}
	f := meter.Figures().Op(Read)
	if f.Count() != reads || f.Bytes != reads*size || f.Stalls() != 0 || f.InFlight != 0 {
		t.Errorf("after %d reads: %+v", reads, f)
	}
	if w := limiter.Waits(); w.Waiting != 0 || w.Nanoseconds < uint64(time.Second) {
		t.Errorf("waits: %+v", w)
	}
	kernel.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// replyBytes is the length of a simple reply in the NBD protocol.
const replyBytes = 16

// sendRead sends a read request as the kernel's nbd driver does.
func sendRead(t *testing.T, to io.Writer, cookie uint64, size uint32) {
	t.Helper()
	request := binary.BigEndian.AppendUint32(nil, 0x25609513)
	request = binary.BigEndian.AppendUint32(request, 0) // no flags, read
	request = binary.BigEndian.AppendUint64(request, cookie)
	request = binary.BigEndian.AppendUint64(request, 0)
	request = binary.BigEndian.AppendUint32(request, size)
	if _, err := to.Write(request); err != nil {
		t.Fatal(err)
	}
}
