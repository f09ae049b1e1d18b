package demo

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// cleanUp undoes everything, whatever has been done so far: through the driver as long
// as it answers, and otherwise by hand. An error names what is left.
func (d *demo) cleanUp(ctx context.Context) error {
	if d.writer != nil {
		_, _ = d.writer.end() // whether it could write does not matter any more
		d.writer = nil
	}
	for _, path := range d.mounts {
		_ = unix.Unmount(path, 0) // what is left is undone by unmountAll
	}
	d.mounts = nil
	var errs []error
	if d.driver != nil {
		d.detachAll(ctx)
		errs = append(errs, d.driver.stop(ctx))
		d.driver = nil
	}
	errs = append(errs, d.unmountAll(), d.stopSupervisor(ctx))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; see %s and %s", err, d.dir, d.runDir)
	}
	return errors.Join(os.RemoveAll(d.dir), os.RemoveAll(d.runDir))
}

// detachAll detaches what can be detached through the driver.
func (d *demo) detachAll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, cleanupPatience/3)
	defer cancel()
	for _, v := range slices.Backward(d.volumes) {
		if d.driver.conn == nil {
			return
		}
		_ = d.detach(ctx, v) // what is left is undone by hand
	}
}

// unmountAll unmounts everything in the demo's directory.
func (d *demo) unmountAll() error {
	mounts, err := mountsIn(d.dir)
	if err != nil {
		return err
	}
	for _, path := range slices.Backward(mounts) {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return nil
}

// mountsIn returns the mount points in a directory, in the order in which they were made.
func mountsIn(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var paths []string
	for scanner := bufio.NewScanner(f); scanner.Scan(); {
		fields := strings.Fields(scanner.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dir+string(filepath.Separator)) {
			paths = append(paths, fields[4])
		}
	}
	return paths, nil
}

// stopSupervisor detaches what is still attached and ends the supervisor. It returns once
// no process of the demo's is left: one may just be starting.
func (d *demo) stopSupervisor(ctx context.Context) error {
	client := supervisor.NewClient(supervisor.SocketPath(d.supervisorDir()))
	for {
		processes, err := processesOf(d.runDir)
		if err != nil || len(processes) == 0 {
			return err
		}
		list, err := client.List(ctx)
		for _, att := range list {
			err = errors.Join(err, client.Detach(ctx, att.ID, true))
		}
		if err == nil {
			err = client.Stop(ctx)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("processes %v do not end: %w", processes, cmp.Or(err, ctx.Err()))
		}
		time.Sleep(pollInterval)
	}
}

// processesOf returns the ids of processes that were started with a directory, or
// something in it, among their arguments.
func processesOf(dir string) ([]string, error) {
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	var pids []string
	for _, path := range paths {
		args, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for arg := range strings.SplitSeq(string(args), "\x00") {
			if arg == dir || strings.HasPrefix(arg, dir+string(filepath.Separator)) {
				pids = append(pids, filepath.Base(filepath.Dir(path)))
				break
			}
		}
	}
	return pids, nil
}

// unmountOwn unmounts what the demo mounted itself.
func (d *demo) unmountOwn() error {
	for _, path := range d.mounts {
		if err := unix.Unmount(path, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	d.mounts = nil
	return nil
}

// whereabouts says which device a volume has, and what serves it.
func (d *demo) whereabouts(ctx context.Context, v *volume) (string, error) {
	client := supervisor.NewClient(supervisor.SocketPath(d.supervisorDir()))
	att, err := client.Get(ctx, v.id)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s (%s, transport %s), served by process %d", att.Device, size(att.SizeBytes), att.Transport, att.PID), nil
}
