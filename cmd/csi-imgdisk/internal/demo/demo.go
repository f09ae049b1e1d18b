// Package demo does the project's main job on this machine, from a VMware disk to a
// mounted, snapshotted, restored, cloned and expanded volume, through the CSI calls that
// Kubernetes makes, and leaves nothing behind.
//
//   - demo.go: Run, and what a demo holds
//   - steps.go: what is shown
//   - volume.go: CSI calls
//   - process.go: the driver's process
//   - files.go, partition.go: reading what is on a volume; workload.go: writing to it
//   - images.go: images, and what qemu-img says of them
//   - cleanup.go: leaving nothing behind, whatever happened
//   - console.go: what people see
//   - sample/: the disk that is imported, and the script that made it
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Options of a demo.
type Options struct {
	// Image is the VMDK (or other image) to import; "" is the sample.
	Image string
	// Binary is the csi-imgdisk that is run as driver.
	Binary string
	// Out is where the demo is told; Terminal says that it is a terminal of Columns.
	Out      io.Writer
	Terminal bool
}

// Step is one step that was done.
type Step struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
}

// cleanupPatience is how long cleaning up may take after a failure or an interrupt.
const cleanupPatience = 90 * time.Second

// demo is a demo under way.
type demo struct {
	options Options
	console *console
	dir     string // everything but the driver's state
	runDir  string // the driver's state, on tmpfs if there is one
	driver  *driverProcess
	volumes []*volume // those that exist, in the order in which they were made
	writer  *writer   // nil if none runs
	mounts  []string  // made by the demo itself
}

// Run does the demo. When ctx ends it stops at once and cleans up; either way nothing is
// left when it returns, or its error says what. It returns the steps that were done.
func Run(ctx context.Context, opts Options) (steps []Step, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("the demo makes block devices and mounts them: run it as root")
	}
	d := &demo{options: opts, console: newConsole(opts.Out, opts.Terminal)}
	defer func() { steps = d.console.steps }()
	if err := d.makeDirs(); err != nil {
		return nil, err
	}
	err = d.run(ctx)
	if err != nil {
		d.console.note("cleaning up")
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupPatience)
	defer cancel()
	if ctx.Err() != nil {
		err = errors.New("interrupted; nothing is left behind")
	}
	if cleanErr := d.cleanUp(clean); cleanErr != nil {
		return nil, errors.Join(err, fmt.Errorf("clean up: %w", cleanErr))
	}
	return nil, err
}

func (d *demo) makeDirs() error {
	var err error
	if d.dir, err = os.MkdirTemp("", "csi-imgdisk-demo-"); err != nil {
		return err
	}
	if d.runDir, err = os.MkdirTemp("/run", "csi-imgdisk-demo-"); err != nil {
		d.runDir = filepath.Join(d.dir, "run")
		err = os.Mkdir(d.runDir, 0o700)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(d.dir))
	}
	return nil
}

// storeName is the store's in handles. It differs from other demos', because handles name
// devices in the kernel.
func (d *demo) storeName() string { return strings.TrimPrefix(filepath.Base(d.dir), "csi-imgdisk-") }

func (d *demo) store() string             { return filepath.Join(d.dir, "store") }
func (d *demo) images() string            { return filepath.Join(d.store(), "images") }
func (d *demo) path(name string) string   { return filepath.Join(d.dir, name) }
func (d *demo) socket() string            { return filepath.Join(d.runDir, "csi.sock") }
func (d *demo) supervisorDir() string     { return filepath.Join(d.runDir, "supervisor") }
func (d *demo) logPath() string           { return filepath.Join(d.runDir, "driver.log") }
func (d *demo) target(name string) string { return filepath.Join(d.dir, "pods", name) }
