package uring_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/uring"
)

// BenchmarkFileRead reads 4 KiB blocks of a file, by a system call for each and by a ring that
// takes so many at a time: from memory, as of a store whose pages are cached, and past the page
// cache. The decision of 2026-11-22 stands on it.
func BenchmarkFileRead(b *testing.B) {
	for _, from := range []struct {
		name, dir string
		flags     int
	}{
		{"memory", "/dev/shm", 0},
		{"disk", os.TempDir(), 0},
		{"disk-direct", os.TempDir(), unix.O_DIRECT},
	} {
		fd := benchFile(b, from.dir, from.flags)
		p, err := unix.Mmap(-1, 0, 64*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = unix.Munmap(p) })
		b.Run(from.name+"/pread", func(b *testing.B) {
			b.SetBytes(4096)
			for b.Loop() {
				if n, err := unix.Pread(fd, p[:4096], rand.Int64N(benchBlocks)*4096); n != 4096 || err != nil {
					b.Fatal(n, err)
				}
			}
		})
		for _, batch := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("%s/ring=%d", from.name, batch), func(b *testing.B) { readByRing(b, fd, p, batch) })
		}
	}
}

const benchBlocks = 16 << 10

func benchFile(b *testing.B, dir string, flags int) int {
	b.Helper()
	path := fmt.Sprintf("%s/uring-bench-%d", dir, os.Getpid())
	b.Cleanup(func() { _ = os.Remove(path) })
	if err := os.WriteFile(path, make([]byte, benchBlocks*4096), 0o600); err != nil {
		b.Skip(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(func() { unix.Close(fd) })
	return fd
}

func readByRing(b *testing.B, fd int, p []byte, batch int) {
	runtime.LockOSThread() // a ring of one thread
	defer runtime.UnlockOSThread()
	r, err := uring.New(uring.Config{Entries: 64, OneThread: true})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		b.Skip(err)
	}
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	b.SetBytes(4096)
	for done := 0; done < b.N; done += batch {
		for i := range batch {
			e := r.Next()
			e.Read(fd, p[i*4096:(i+1)*4096], uint64(i))
			e.Off = uint64(rand.Int64N(benchBlocks) * 4096)
		}
		for left := batch; left > 0; {
			if err := r.Enter(left, 0); err != nil {
				b.Fatal(err)
			}
			for c, ok := r.Take(); ok; c, ok = r.Take() {
				if left--; c.Res != 4096 {
					b.Fatal("a read of", c.Res)
				}
			}
		}
	}
}
