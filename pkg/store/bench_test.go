package store_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// BenchmarkCreateSnapshot takes live snapshots under 32 writers, and reports how long the
// slowest write took while one was being taken: the pause a guest sees.
func BenchmarkCreateSnapshot(b *testing.B) {
	dir, err := vfs.OpenDir(b.TempDir())
	must(b, err)
	defer dir.Close()
	_, err = store.Init(dir)
	must(b, err)
	s, err := store.Open(b.Context(), "bench", dir, store.Options{PollInterval: 5 * time.Millisecond, MaxChain: 60})
	must(b, err)
	create(b, s, store.CreateVolumeRequest{Name: "v", SizeBytes: 64 * mib})
	a := attach(b, s, "v", "n")
	var slowest atomic.Int64
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for i := range 32 {
		writers.Go(func() {
			p := make([]byte, 4096)
			for off := int64(i) * 4096; ; off = (off + 32*4096) % (64 * mib) {
				select {
				case <-stop:
					return
				default:
				}
				began := time.Now()
				if _, err := a.WriteAt(p, off); err != nil {
					b.Error(err)
					return
				}
				took := int64(time.Since(began))
				for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
				}
			}
		})
	}
	var pauses time.Duration
	n := 0
	for b.Loop() {
		if n == 50 {
			break // the chain is as long as it may become
		}
		slowest.Store(0)
		must(b, ignoreSnapshot(s.CreateSnapshot(b.Context(), "v", fmt.Sprintf("s%d", n))))
		pauses += time.Duration(slowest.Load())
		n++
	}
	close(stop)
	writers.Wait()
	b.ReportMetric(float64(pauses.Microseconds())/1000/float64(n), "ms-pause")
	must(b, a.Close())
}
