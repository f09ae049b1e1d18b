package supervisor

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// Operations of the server protocol.
const (
	opReady  = "ready"
	opHello  = "hello"
	opServe  = "serve"
	opFiles  = "files"
	opWatch  = "watch"
	opStats  = "stats"
	opLimits = "limits"
	opDebug  = "debug"
	opStop   = "stop"
)

// controlRequest is a message to a server.
type controlRequest struct {
	Op       string         `json:"op"`
	Protocol string         `json:"protocol,omitempty"` // serve
	Ended    int            `json:"ended,omitempty"`    // watch: the count the caller knows
	Limits   *filter.Limits `json:"limits,omitempty"`   // limits: nil is the volume's own
}

// controlResponse is a server's answer: Error, or the fields of the operation.
type controlResponse struct {
	Error   *wireError   `json:"failure,omitempty"`
	Hello   *Hello       `json:"hello,omitempty"`
	Version string       `json:"version,omitempty"` // ready: the program's
	Files   []string     `json:"files,omitempty"`   // files: the protocol of each descriptor that comes along
	Ended   int          `json:"ended,omitempty"`   // serve, files, watch: how many descriptors have ended in this server's life
	Reason  string       `json:"reason,omitempty"`
	Stats   *ServerStats `json:"stats,omitempty"`
	Debug   *DebugInfo   `json:"debug,omitempty"`
}

const (
	maxMessageBytes = 64 << 10
	// maxDescriptors bounds what one message carries and what one server serves.
	maxDescriptors = 64
)

// controlConn carries JSON messages with descriptors over a SOCK_SEQPACKET socket.
// Sending and receiving are each for one goroutine at a time.
type controlConn struct {
	*net.UnixConn
}

// send sends one message; the files stay the caller's.
func (c controlConn) send(message any, files []*os.File) error {
	body := marshal(message)
	if len(body) > maxMessageBytes || len(files) > maxDescriptors {
		return fmt.Errorf("message of %d bytes with %d descriptors: at most %d and %d: %w",
			len(body), len(files), maxMessageBytes, maxDescriptors, block.ErrInvalid)
	}
	var rights []byte
	if len(files) > 0 {
		fds, err := dupAll(files)
		defer closeAll(fds)
		if err != nil {
			return err
		}
		rights = unix.UnixRights(fds...)
	}
	_, _, err := c.WriteMsgUnix(body, rights, nil)
	return err
}

// receive reads one message into v and returns the descriptors that came with it,
// which are the caller's then.
func (c controlConn) receive(v any) ([]*os.File, error) {
	body := make([]byte, maxMessageBytes)
	oob := make([]byte, unix.CmsgSpace(4*maxDescriptors))
	n, oobn, flags, _, err := c.ReadMsgUnix(body, oob)
	if err != nil {
		return nil, err
	}
	files, err := parseRights(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		closeFiles(files)
		return nil, fmt.Errorf("control message longer than %d bytes or %d descriptors: %w", maxMessageBytes, maxDescriptors, block.ErrInvalid)
	}
	if err := json.Unmarshal(body[:n], v); err != nil {
		closeFiles(files)
		return nil, fmt.Errorf("control message: %w: %w", err, block.ErrInvalid)
	}
	return files, nil
}

func parseRights(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message's descriptors: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue // not descriptors
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

// dupAll duplicates descriptors, so that they can be sent without keeping their
// files from being closed. What it returns is to be closed also after an error.
func dupAll(files []*os.File) ([]int, error) {
	var fds []int
	for _, f := range files {
		fd, err := dupFD(f)
		if err != nil {
			return fds, fmt.Errorf("duplicate descriptor of %s: %w", f.Name(), err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// dupFD goes through SyscallConn because File.Fd would switch the open file
// description, which is shared with other processes, to blocking mode.
func dupFD(f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	dup, dupErr := -1, error(nil)
	if err := raw.Control(func(fd uintptr) {
		dup, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, err
	}
	return dup, dupErr
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// listenUnix listens on path, which must not exist, for network "unix" or
// "unixpacket". The name stays when the listener is closed.
func listenUnix(network, path string) (*net.UnixListener, error) {
	short, done, err := shortSocketPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	l, err := net.ListenUnix(network, &net.UnixAddr{Net: network, Name: short})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// dialUnix connects to a socket at path.
func dialUnix(network, path string) (*net.UnixConn, error) {
	short, done, err := shortSocketPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	c, err := net.DialUnix(network, nil, &net.UnixAddr{Net: network, Name: short})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return c, nil
}

// maxSocketPath is the length of sockaddr_un.sun_path without its terminating zero.
const maxSocketPath = 107

// shortSocketPath returns a path that fits into a socket address and names the same
// file, for as long as done is not called.
func shortSocketPath(path string) (short string, done func(), err error) {
	if len(path) <= maxSocketPath {
		return path, func() {}, nil
	}
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("open directory of socket %s: %w", path, err)
	}
	short = fmt.Sprintf("/proc/self/fd/%d/%s", dir, filepath.Base(path))
	if len(short) > maxSocketPath {
		unix.Close(dir)
		return "", nil, fmt.Errorf("socket %s: file name longer than a socket address allows: %w", path, block.ErrInvalid)
	}
	return short, func() { unix.Close(dir) }, nil
}

// peerCredentials returns who is at the other end: for a connection that was dialled,
// the process that listened.
func peerCredentials(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}

// hungUp says whether the other end of c is closed.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	up := false
	err = raw.Control(func(fd uintptr) {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		_, err := unix.Poll(poll, 0)
		up = err == nil && poll[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) == 0
	})
	return err != nil || !up
}
