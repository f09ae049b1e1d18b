package attach

import (
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// A fuseMount is a FUSE file system that is mounted nowhere: the kernel hands out a
// descriptor for its root, and it lives as long as that or a file opened through it
// does. So there is no mount point to clean up, nobody stumbles over a file system
// whose server is gone, and it doesn't matter in which mount namespace, of which
// container, it was made.
type fuseMount struct {
	dev        *os.File // the /dev/fuse descriptor: requests arrive here
	root       int
	connection uint32 // its number in fusectl

	abortOnce sync.Once
}

// mountFUSE makes a FUSE file system. It waits for no server.
func mountFUSE() (*fuseMount, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("fuse: open /dev/fuse: %w", err)
	}
	m := &fuseMount{dev: os.NewFile(uintptr(fd), "/dev/fuse"), root: -1}
	m.root, err = detachedMount("fuse", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOATIME,
		"source", "csi-imgdisk",
		"fd", strconv.Itoa(fd),
		"rootmode", strconv.FormatUint(unix.S_IFDIR, 8),
		"user_id", "0", "group_id", "0",
		"max_read", strconv.Itoa(fuseMaxRequestBytes))
	if err != nil {
		m.close()
		return nil, err
	}
	var st unix.Statx_t
	if err := unix.Statx(m.root, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st); err != nil {
		m.close()
		return nil, fmt.Errorf("fuse: statx of the new file system: %w", err)
	}
	m.connection = st.Dev_minor // the kernel numbers connections by their device number
	return m, nil
}

// open opens the file. It waits for the server: abort ends that.
func (m *fuseMount) open(name string, readOnly bool) (*os.File, error) {
	flags := unix.O_RDWR | unix.O_CLOEXEC | unix.O_NOFOLLOW
	if readOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW
	}
	for {
		fd, err := unix.Openat(m.root, name, flags, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("fuse: open the device's file: %w", err)
		}
		return os.NewFile(uintptr(fd), name), nil
	}
}

// abort ends the connection: whoever waits for its server gets an error.
func (m *fuseMount) abort() {
	m.abortOnce.Do(func() { _ = abortFUSE(m.connection) })
}

// close lets go of the file system; dev stays the caller's if it was taken out.
func (m *fuseMount) close() {
	if m.root >= 0 {
		unix.Close(m.root)
	}
	if m.dev != nil {
		m.dev.Close()
	}
}

// abortFUSE ends a FUSE connection by its number, through a control file system of
// our own: the usual one is not mounted in every container.
func abortFUSE(connection uint32) error {
	root, err := detachedMount("fusectl", 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	path := fmt.Sprintf("%d/abort", connection)
	fd, err := unix.Openat(root, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return fmt.Errorf("fuse: connection %d: %w", connection, block.ErrNotFound)
	}
	if err != nil {
		return fmt.Errorf("fuse: open fusectl's %s: %w", path, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("1")); err != nil {
		return fmt.Errorf("fuse: write fusectl's %s: %w", path, err)
	}
	return nil
}

// detachedMount makes a file system from key, value pairs and returns a descriptor
// for its root.
func detachedMount(fstype string, attrs int, options ...string) (int, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer unix.Close(fs)
	for i := 0; i < len(options); i += 2 {
		if err := unix.FsconfigSetString(fs, options[i], options[i+1]); err != nil {
			return -1, fmt.Errorf("%s: set %s=%s: %w", fstype, options[i], options[i+1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("%s: create file system: %w", fstype, err)
	}
	root, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, fmt.Errorf("%s: fsmount: %w", fstype, err)
	}
	return root, nil
}

// fuseAlive says whether the connection still has its file system.
func fuseAlive(dev *os.File) bool {
	raw, err := dev.SyscallConn()
	if err != nil {
		return false
	}
	alive := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		for {
			_, err := unix.Poll(fds, 0)
			if err == unix.EINTR {
				continue
			}
			alive = err == nil && fds[0].Revents&(unix.POLLERR|unix.POLLNVAL) == 0
			return
		}
	})
	return err == nil && alive
}

// notifyFUSE writes a notification: a message of the server's that answers nothing.
func notifyFUSE(dev *os.File, code uint32, payload []byte) error {
	msg := make([]byte, fuseOutHeaderBytes+len(payload))
	order.PutUint32(msg[outLen:], uint32(len(msg)))
	order.PutUint32(msg[outError:], code)
	copy(msg[fuseOutHeaderBytes:], payload)
	fd, err := dupDescriptor(dev)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, msg); err != nil {
		return fmt.Errorf("fuse: notification %d: %w", code, err)
	}
	return nil
}
