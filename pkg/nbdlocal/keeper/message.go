package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Letters that begin a message.
const (
	opKeep = 'P'
	opGet  = 'G'
	opDrop = 'D'
	opNone = 'N'
)

const (
	maxNameBytes    = 64
	maxMessageBytes = 1 + maxNameBytes
)

// Files of a keeper's directory.
const (
	socketFile = "keeper.sock"
	lockFile   = "keeper.lock"
)

func validName(name []byte) bool {
	if len(name) < 1 || len(name) > maxNameBytes {
		return false
	}
	for _, c := range name {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

// message is one message, with a descriptor or -1.
type message struct {
	op   byte
	name string
	fd   int
}

// sendMessage sends a message; the descriptor stays the caller's.
func sendMessage(socket int, m message, flags int) error {
	var rights []byte
	if m.fd >= 0 {
		rights = unix.UnixRights(m.fd)
	}
	for {
		_, err := unix.SendmsgN(socket, append([]byte{m.op}, m.name...), rights, nil, flags|unix.MSG_NOSIGNAL)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

var errMessage = fmt.Errorf("the message makes no sense: %w", block.ErrInvalid)

// errHungUp says that the other end is gone.
var errHungUp = fmt.Errorf("the connection has ended: %w", block.ErrClosed)

// receiveMessage receives a message; its descriptor is the caller's, who also closes it.
func receiveMessage(socket, flags int) (message, error) {
	body := make([]byte, maxMessageBytes+1)
	oob := make([]byte, unix.CmsgSpace(4))
	var n, oobn, got int
	var err error
	for {
		n, oobn, got, _, err = unix.Recvmsg(socket, body, oob, flags|unix.MSG_CMSG_CLOEXEC)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return message{fd: -1}, err
	}
	m := message{fd: -1}
	for _, fd := range descriptors(oob[:oobn]) {
		if m.fd >= 0 {
			unix.Close(m.fd)
		}
		m.fd = fd
	}
	switch {
	case n == 0 && m.fd < 0:
		return m, errHungUp
	case n < 1 || n > maxMessageBytes || got&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		m.close()
		return message{fd: -1}, errMessage
	}
	m.op, m.name = body[0], string(body[1:n])
	return m, nil
}

func (m *message) close() {
	if m.fd >= 0 {
		unix.Close(m.fd)
		m.fd = -1
	}
}

func descriptors(oob []byte) []int {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds []int
	for i := range messages {
		if some, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

// withSocketPath calls f with a path of the directory's socket that fits into an address,
// however long the directory's own is.
func withSocketPath(dir string, f func(path string) error) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: open directory %s: %w", dir, err)
	}
	defer unix.Close(fd)
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", fd, socketFile))
}

// takeLock takes the lock that a keeper holds from before its start to its end;
// block.ErrLocked if one does.
func takeLock(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("keeper: open lock: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = block.ErrLocked
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("keeper: lock %s: %w", path, err)
	}
	return f, nil
}
