package attach

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// busyError is an ErrBusy that names who uses the block device, as far as this
// process can see: other containers' processes only from the host's pid namespace.
func busyError(name string) error {
	found := slices.Concat(mountsOf(name), stackedOn(name), openersOf(name))
	if len(found) == 0 {
		return fmt.Errorf("/dev/%s: %w: in use, by something this process can't see", name, block.ErrBusy)
	}
	const most = 8
	if len(found) > most {
		found = append(found[:most], fmt.Sprintf("and %d more", len(found)-most))
	}
	return fmt.Errorf("/dev/%s: %w: %s", name, block.ErrBusy, strings.Join(found, ", "))
}

// mountsOf says where the device is mounted, in any mount namespace.
func mountsOf(name string) []string {
	number, _ := os.ReadFile("/sys/block/" + name + "/dev")
	dev := strings.TrimSpace(string(number))
	var found []string
	seen := map[string]bool{}
	for _, pid := range processes() {
		ns, err := os.Readlink("/proc/" + pid + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		for _, dir := range mountPoints("/proc/"+pid+"/mountinfo", dev, "/dev/"+name) {
			if s := "mounted on " + dir; !slices.Contains(found, s) {
				found = append(found, s)
			}
		}
	}
	return found
}

// mountPoints returns those of a mountinfo's mount points that are of the device with
// this number (most file systems) or source (those with numbers of their own).
func mountPoints(mountinfo, number, source string) []string {
	f, err := os.Open(mountinfo)
	if err != nil {
		return nil
	}
	defer f.Close()
	var dirs []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// id parent major:minor root mountpoint options... - fstype source ...
		head, tail, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Fields(head), strings.Fields(tail)
		if ok && len(fields) >= 5 && (fields[2] == number || len(rest) >= 2 && rest[1] == source) {
			dirs = append(dirs, unescapeMount(fields[4]))
		}
	}
	return dirs
}

// unescapeMount undoes the octal escapes of mountinfo.
func unescapeMount(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// stackedOn says which block devices stand on this one: device mapper, RAID, and loop
// devices, as kubelet puts on raw block volumes.
func stackedOn(name string) []string {
	var found []string
	entries, _ := os.ReadDir("/sys/block/" + name + "/holders")
	for _, e := range entries {
		found = append(found, "under /dev/"+e.Name())
	}
	backings, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, path := range backings {
		if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == "/dev/"+name {
			found = append(found, "under /dev/"+strings.Split(path, "/")[3])
		}
	}
	return found
}

// openersOf says which processes, other than this one, have the device open.
func openersOf(name string) []string {
	var want unix.Stat_t
	if err := unix.Stat("/dev/"+name, &want); err != nil {
		return nil
	}
	var found []string
	for _, pid := range processes() {
		if pid == strconv.Itoa(os.Getpid()) || !hasOpen(pid, want.Rdev) {
			continue
		}
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		found = append(found, fmt.Sprintf("opened by process %s (%s)", pid, strings.TrimSpace(string(comm))))
	}
	return found
}

func hasOpen(pid string, rdev uint64) bool {
	dir, err := os.Open("/proc/" + pid + "/fd")
	if err != nil {
		return false
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, n := range names {
		// Without synchronising: a file on a dead network file system would hang it.
		var st unix.Statx_t
		err := unix.Statx(int(dir.Fd()), n, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Mkdev(st.Rdev_major, st.Rdev_minor) == rdev {
			return true
		}
	}
	return false
}

// processes returns the numbers of those this process can see.
func processes() []string {
	entries, _ := os.ReadDir("/proc")
	var pids []string
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, e.Name())
		}
	}
	return pids
}
