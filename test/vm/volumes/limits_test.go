package volumes

import (
	"bytes"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// limitedWorkers write at the same time: more than a server has threads.
const limitedWorkers = 24

// TestLimits: what a volume may do in a second counts on every transport: as its class
// says, as it is changed while it is in use, and after its server has died. That requests
// take too long proves nothing on a slow machine; that they don't, does.
func TestLimits(t *testing.T) {
	on(t, "stall")
	perTransport(t, func(t *testing.T, n *node.Node, parameters map[string]string) {
		parameters["iops"] = "40"
		v, err := n.Create(t.Context(), "v", 16*mib, parameters)
		must(t, err)
		must(t, v.Attach(t.Context()))
		w := newLimitedWriter(t, v.Path())
		w.atLeast(120, 4096, 120/40)
		w.setLimits(n, v, filter.Limits{BytesPerSecond: 2 * mib})
		w.atLeast(48, 128<<10, 3)
		n.Kill(node.Server)
		w.atLeast(48, 128<<10, 3)
		// Those that wait for a limit do not wait for it once there is none.
		w.setLimits(n, v, filter.Limits{IOPS: filter.MinIOPS})
		written := make(chan struct{})
		go func() { w.write(3000, 4096); close(written) }() // five minutes' worth
		time.Sleep(3 * time.Second)
		w.setLimits(n, v, filter.Limits{})
		select {
		case <-written:
		case <-time.After(node.Patience):
			t.Fatal("requests wait for a limit that there is no more")
		}
		w.close()
		must(t, v.Detach(t.Context()))
		must(t, v.Delete(t.Context()))
	})
}

// limitedWriter writes to a device past the page cache.
type limitedWriter struct {
	t   *testing.T
	dev *os.File
	buf []byte // aligned
}

func newLimitedWriter(t *testing.T, path string) *limitedWriter {
	t.Helper()
	dev, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	must(t, err)
	buf, err := unix.Mmap(-1, 0, 128<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	must(t, err)
	copy(buf, bytes.Repeat([]byte("limited "), len(buf)/8))
	return &limitedWriter{t, dev, buf}
}

func (w *limitedWriter) close() {
	w.dev.Close()
	must(w.t, unix.Munmap(w.buf))
}

func (w *limitedWriter) setLimits(n *node.Node, v *node.Volume, limits filter.Limits) {
	w.t.Helper()
	list, err := n.Supervisor().List(w.t.Context())
	if err != nil || len(list) != 1 {
		w.t.Fatalf("attachments %v, %v, want that of %s", list, err, v.ID)
	}
	_, err = n.Supervisor().SetLimits(w.t.Context(), list[0].ID, &limits)
	must(w.t, err)
}

// atLeast makes so many writes, for which a limit must take so many seconds, less those
// that may be saved up for and the last one, which may overdraw.
func (w *limitedWriter) atLeast(writes, size int, seconds float64) {
	w.t.Helper()
	start := time.Now()
	w.write(writes, size)
	took := time.Since(start)
	least := time.Duration(seconds*float64(writes-1)/float64(writes)*float64(time.Second)) - filter.DefaultBurst
	if took < least {
		w.t.Errorf("%d writes of %d bytes took %v, less than the %v that the limit takes", writes, size, took, least)
	}
	w.t.Logf("%d writes of %d bytes took %v, at least %v", writes, size, took.Round(time.Millisecond), least.Round(time.Millisecond))
}

// write makes writes, some at the same time, none of them beside another.
func (w *limitedWriter) write(writes, size int) {
	next := make(chan int64, writes)
	for i := range writes {
		next <- int64(i) % 48 * (256 << 10)
	}
	close(next)
	errs := make(chan error, limitedWorkers)
	var writing sync.WaitGroup
	for range limitedWorkers {
		writing.Go(func() {
			for off := range next {
				if _, err := w.dev.WriteAt(w.buf[:size], off); err != nil {
					errs <- fmt.Errorf("write at %d: %w", off, err)
					return
				}
			}
		})
	}
	writing.Wait()
	close(errs)
	for err := range errs {
		w.t.Error(err)
	}
}
