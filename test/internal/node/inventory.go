package node

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// devices returns the block devices in the kernel that bear this node's name.
func (n *Node) devices() (names []string) {
	// nbd's show the volume's handle, loop devices a file's name made of it.
	mark := n.cfg.Name + "/"
	paths, _ := filepath.Glob("/sys/block/*")
	for _, path := range paths {
		for _, attribute := range []string{"backend", "loop/backing_file"} {
			b, err := os.ReadFile(filepath.Join(path, attribute))
			if err == nil && (strings.Contains(string(b), mark) || strings.Contains(string(b), url.PathEscape(mark))) {
				names = append(names, filepath.Base(path))
			}
		}
	}
	return names
}

// mountsBelow returns the mount points in a directory, in the order in which they were
// made.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var paths []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			paths = append(paths, fields[4])
		}
	}
	return paths, lines.Err()
}

// unmountBelow unmounts what is mounted in a directory, and says what that was.
func unmountBelow(dir string) error {
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range slices.Backward(mounts) {
		errs = append(errs, fmt.Errorf("%s is still mounted", path), unix.Unmount(path, unix.MNT_DETACH))
	}
	return errors.Join(errs...)
}

// Inventory lists all of a machine that attaching volumes can leave something in: block
// devices, mounts, FUSE connections, and files in /run and /dev, with what programs keep in
// memory there. On a machine that does nothing else it is the same before and after.
func Inventory() ([]string, error) {
	var list []string
	for _, root := range []string{"/run", "/dev"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			// Loop devices stay once they were made, without contents.
			if err == nil && !strings.HasPrefix(path, "/dev/loop") {
				list = append(list, "file "+path)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	blocks, _ := filepath.Glob("/sys/block/*")
	for _, path := range blocks {
		if _, err := os.Stat(filepath.Join(path, "loop")); err == nil || !strings.HasPrefix(filepath.Base(path), "loop") {
			list = append(list, "device "+path)
		}
	}
	connections, _ := filepath.Glob("/sys/fs/fuse/connections/*")
	for _, path := range connections {
		list = append(list, "connection "+path)
	}
	mounts, err := mountsBelow("")
	for _, path := range mounts {
		list = append(list, "mount "+path)
	}
	return list, err
}

// Difference returns what is in after and not in before.
func Difference(before, after []string) (left []string) {
	for _, entry := range after {
		if !slices.Contains(before, entry) {
			left = append(left, entry)
		}
	}
	return left
}
