package supervisor

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A server of the kernel's nbd driver leaves idle connections when it is stopped, all of
// them, and what was written on any is durable then.
func TestServer_NBD(t *testing.T) {
	p, image := newServerProcess(t)
	ctx := testContext(t)
	var kernel, server []*os.File
	for range 2 {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		kernel = append(kernel, os.NewFile(uintptr(pair[0]), "kernel"))
		server = append(server, os.NewFile(uintptr(pair[1]), "server"))
	}
	defer closeFiles(kernel)
	if _, err := p.serve(ctx, "nbd", server); err != nil {
		t.Fatal(err)
	}
	closeFiles(server)
	for i, k := range kernel {
		nbdWrite(t, k, int64(i)*4096, bytes.Repeat([]byte{byte('a' + i)}, 4096))
	}
	time.Sleep(100 * time.Millisecond) // until both are idle
	if err := p.stop(ctx); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(image)
	if err != nil || content[0] != 'a' || content[4096] != 'b' || content[8192] != 0 {
		t.Errorf("the image does not hold what was written (%v)", err)
	}
	for _, k := range kernel {
		_ = k.SetReadDeadline(time.Now().Add(patience))
		if n, err := k.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("after the stop: %d bytes, %v", n, err)
		}
	}
}

// nbdWrite sends a write request of NBD's transmission phase, and reads its reply.
func nbdWrite(t *testing.T, conn *os.File, off int64, data []byte) {
	t.Helper()
	req := binary.BigEndian.AppendUint32(nil, 0x25609513)
	req = binary.BigEndian.AppendUint32(req, 1) // no flags, write
	req = binary.BigEndian.AppendUint64(req, 77)
	req = binary.BigEndian.AppendUint64(req, uint64(off))
	req = binary.BigEndian.AppendUint32(req, uint32(len(data)))
	if _, err := conn.Write(append(req, data...)); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(conn, reply); err != nil {
		t.Fatal(err)
	}
	want := append([]byte{0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0}, req[8:16]...)
	if !bytes.Equal(reply, want) {
		t.Fatalf("reply %x, want %x", reply, want)
	}
}
