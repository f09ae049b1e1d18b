package nbdlocal

import (
	"fmt"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// BenchmarkTransfer moves what a client reads from a file in memory into a unix socket, as
// servers do by reading it into a buffer, and by sendfile, which spares a copy. The decision of
// 2026-11-22 stands on it.
func BenchmarkTransfer(b *testing.B) {
	f, err := os.CreateTemp("/dev/shm", "transfer")
	if err != nil {
		b.Skip(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	const fileBytes = 64 << 20
	if _, err := f.Write(make([]byte, fileBytes)); err != nil {
		b.Fatal(err)
	}
	ways := []struct {
		name string
		send func(to int, p []byte, off int64) (int, error)
	}{
		{"copy", func(to int, p []byte, off int64) (int, error) {
			if _, err := f.ReadAt(p, off); err != nil {
				return 0, err
			}
			return unix.Write(to, p)
		}},
		{"sendfile", func(to int, p []byte, off int64) (int, error) {
			return unix.Sendfile(to, int(f.Fd()), &off, len(p))
		}},
	}
	for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
		for _, way := range ways {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, way.name), func(b *testing.B) {
				transfer(b, size, func(to int, p []byte, i int) (int, error) {
					return way.send(to, p, int64(i*size%fileBytes))
				})
			})
		}
	}
}

// transfer sends pieces of so many bytes to somebody who reads them.
func transfer(b *testing.B, size int, send func(to int, p []byte, i int) (int, error)) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	for _, fd := range fds {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20)
	}
	read := os.NewFile(uintptr(fds[1]), "socket")
	defer read.Close()
	received := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{read}, make([]byte, size))
		received <- err
	}()
	p := make([]byte, size)
	b.SetBytes(int64(size))
	for i := 0; b.Loop(); i++ {
		for sent := 0; sent < size; {
			n, err := send(fds[0], p[:size-sent], i)
			if err != nil {
				b.Fatal(err)
			}
			sent += n
		}
	}
	unix.Close(fds[0])
	if err := <-received; err != nil {
		b.Fatal(err)
	}
}
