package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// Contenders that make block devices on this machine, beside ours.
const (
	qemuStorageDaemon = "qemu-storage-daemon"
	plainLoop         = "loop device"
)

const (
	// removePatience is how long a device may be in use after its load, by whoever looks
	// at new devices.
	removePatience = 30 * time.Second
	pollInterval   = 20 * time.Millisecond
)

// device is a block device of an image.
type device struct {
	path   string
	pids   []int        // that serve it; none if the kernel does
	remove func() error // the device, and whatever it takes
}

func deviceContenders(format string) []string {
	if format == rawName {
		return []string{ours, qemuStorageDaemon, plainLoop}
	}
	return []string{ours, qemuStorageDaemon}
}

// measureDevices measures block devices on this machine: ours through the fuse transport,
// qemu-storage-daemon's through FUSE and a loop device with direct I/O, and a loop device
// alone. A device stays for all works, so that making it is not most of the time.
func (b *bench) measureDevices(ctx context.Context) error {
	list := slices.DeleteFunc(deviceWorks(), func(w work) bool { return !b.wants(sectionDevice, w.name) })
	if len(list) == 0 {
		return nil
	}
	if os.Geteuid() != 0 {
		b.skip("block devices", errors.New("making them needs root"))
		return nil
	}
	for _, format := range mainFormats {
		if _, err := formats.Lookup(format); err != nil || !slices.Contains(b.formats, format) {
			continue
		}
		if err := b.measureDevice(ctx, format, list); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) measureDevice(ctx context.Context, format string, list []work) error {
	there := b.at(fullImage)
	images := imageSet{dir: there.dir}
	defer images.remove()
	image, err := images.getFull(ctx, there, format)
	if err == nil {
		err = b.takeTurns(ctx, "block device", format, deviceContenders(format), func(name string) ([]figure, error) {
			return there.useDevice(ctx, name, format, image, list)
		})
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		b.fail(format+": block device", err)
	}
	return nil
}

// useDevice makes a contender's device, lets it do all works, and removes it.
func (b *bench) useDevice(ctx context.Context, name, format, image string, list []work) (all []figure, err error) {
	d, err := b.makeDevice(name, format, image)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.remove()) }()
	var idle usage
	for i, w := range list {
		l := load{mode: w.mode, blockBytes: w.blockBytes, depth: w.depth, sizeBytes: b.usedBytes(), duration: b.duration()}
		r, u, err := watchLoad(d.pids, func() (rate, error) { return runFio(ctx, onDevice(d.path), l) })
		if err != nil {
			return nil, err
		}
		if i == 0 {
			idle = u
		}
		u.idleBytes = idle.idleBytes // not what earlier loads have left
		all = append(all, figure{w.name, w.unit(), r.in(w.unit()), u})
	}
	if idle.idleBytes > 0 {
		all = append(all, figure{work: idleDevice, unit: mebibytes, value: float64(idle.idleBytes) / float64(mib1)})
	}
	return all, nil
}

// makeDevice makes a block device. An interrupt does not end it half way: it can be removed
// once it is there.
func (b *bench) makeDevice(name, format, image string) (*device, error) {
	switch name {
	case ours:
		return b.attachOurs(format, image)
	case qemuStorageDaemon:
		return b.exportFuse(format, image)
	case plainLoop:
		path, err := bindLoop(filepath.Join(b.dir, image))
		return &device{path: path, remove: func() error { return clearLoop(path) }}, err
	}
	return nil, fmt.Errorf("nobody who makes devices is called %q", name)
}

// apart starts a program in a process group of its own, which a terminal's interrupt does
// not reach: what it makes is removed by us.
func apart(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// outputOf runs a program apart and returns what it prints.
func outputOf(name string, args ...string) (string, error) {
	cmd := apart(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(name), args[0], err, lastLines(stderr.String()))
	}
	return stdout.String(), nil
}

// attachOurs attaches with our program, whose supervisor goes with the last device.
func (b *bench) attachOurs(format, image string) (*device, error) {
	path := filepath.Join(b.dir, image)
	detach := func() error {
		return retry(func() error {
			_, err := outputOf(b.binary, "detach", path, "--run-dir", b.runDir)
			return err
		})
	}
	out, err := outputOf(b.binary, "attach", path, "--format", format, "--transport", "fuse", "--run-dir", b.runDir, "--output", "json")
	if err != nil {
		return nil, err
	}
	var info struct {
		Device string `json:"device"`
		PID    int    `json:"pid"`
	}
	err = json.Unmarshal([]byte(out), &info)
	if err == nil && (info.Device == "" || info.PID == 0) {
		err = errors.New("no device or no pid")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("what attach printed (%s): %w", lastLines(out), err), detach())
	}
	return &device{path: info.Device, pids: []int{info.PID}, remove: detach}, nil
}

// exportFuse has qemu-storage-daemon show an image as a file, and binds a loop device to that.
func (b *bench) exportFuse(format, image string) (*device, error) {
	file := filepath.Join(b.dir, "export")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	daemon := apart(qemuStorageDaemon,
		"--blockdev", "driver=file,node-name=file,filename="+filepath.Join(b.dir, image),
		"--blockdev", "driver="+format+",node-name=disk,file=file",
		"--export", "type=fuse,id=export,node-name=disk,writable=on,mountpoint="+file)
	var stderr bytes.Buffer
	daemon.Stderr = &stderr
	if err := daemon.Start(); err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		_ = daemon.Wait() // that it ended is what matters
		close(ended)
	}()
	stop := func() error { return stopDaemon(daemon.Process, ended, file) }
	if err := awaitMount(file, ended); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", qemuStorageDaemon, err), stop(), errors.New(lastLines(stderr.String())))
	}
	path, err := bindLoop(file)
	if err != nil {
		return nil, errors.Join(err, stop())
	}
	remove := func() error { return errors.Join(clearLoop(path), stop()) }
	return &device{path: path, pids: []int{daemon.Process.Pid}, remove: remove}, nil
}

// awaitMount returns once something is mounted on a file.
func awaitMount(file string, ended <-chan struct{}) error {
	for deadline := time.Now().Add(startPatience); ; {
		mounted, err := isMounted(file)
		if mounted || err != nil {
			return err
		}
		select {
		case <-ended:
			return errors.New("it ended")
		case <-time.After(pollInterval):
		}
		if time.Now().After(deadline) {
			return errors.New("it shows no file")
		}
	}
}

func isMounted(file string) (bool, error) {
	text, err := os.ReadFile("/proc/self/mounts")
	return strings.Contains(string(text), " "+file+" "), err
}

// stopDaemon ends the process behind a mounted file, which closes the image and unmounts.
func stopDaemon(process *os.Process, ended <-chan struct{}, file string) error {
	_ = process.Signal(syscall.SIGTERM) // it may have ended
	var killed error
	select {
	case <-ended:
	case <-time.After(stopPatience):
		_ = process.Kill()
		<-ended
		killed = fmt.Errorf("%s does not end and was killed", qemuStorageDaemon)
	}
	if mounted, err := isMounted(file); mounted || err != nil {
		return errors.Join(killed, err, unix.Unmount(file, unix.MNT_DETACH))
	}
	return killed
}

// bindLoop binds a file to a loop device with direct I/O.
func bindLoop(file string) (string, error) {
	out, err := outputOf("losetup", "--find", "--show", "--direct-io=on", file)
	if err != nil {
		return "", err
	}
	path := strings.TrimSpace(out)
	direct, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "loop/dio"))
	if err == nil && strings.TrimSpace(string(direct)) != "1" {
		err = fmt.Errorf("%s of %s has no direct I/O", path, file)
	}
	if err != nil {
		return "", errors.Join(err, clearLoop(path))
	}
	return path, nil
}

// clearLoop unbinds a loop device, and returns once it is unbound: as long as somebody has
// it open, it waits for that.
func clearLoop(path string) error {
	if _, err := outputOf("losetup", "--detach", path); err != nil {
		return err
	}
	return retry(func() error {
		_, err := os.Stat(filepath.Join("/sys/block", filepath.Base(path), "loop/backing_file"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return errors.Join(fmt.Errorf("%s is still bound", path), err)
	})
}

// retry tries until it succeeds or patience ends.
func retry(try func() error) error {
	deadline := time.Now().Add(removePatience)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		time.Sleep(pollInterval)
	}
}
