package supervisor

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/keeper"
)

// keptProtocol is the one whose descriptor keeps the device alive: the kernel ends a FUSE
// connection with its last holder. A keeper holds it beside server and supervisor.
const keptProtocol = "fuse"

// RunKeeper is the body of a keeper's process, small; see keeper.Run.
func RunKeeper(dir string, confine func() error) error {
	return keeper.Run(dir, func() error {
		shedStartup()
		return confine()
	})
}

// keep has the keeper hold what a server is about to serve.
func (a *attachment) keep(protocol string, files []*os.File) {
	if a.s.keeper == nil || protocol != keptProtocol || len(files) == 0 {
		return
	}
	if err := a.s.keeper.Keep(dirName(a.id), files[0]); err != nil {
		a.log.Error("nobody but server and supervisor holds the device, until this succeeds", "error", err)
	}
}

// keepServed has the keeper hold what the server of a device that has just been made
// serves. Not earlier: a device that is being made ends with its server and its
// supervisor, or else a successor of theirs would find the kernel waiting for them.
func (a *attachment) keepServed(ctx context.Context) error {
	if a.s.keeper == nil || a.rec.Kernel.Transport != keptProtocol {
		return nil
	}
	files, _, err := a.proc.files(ctx)
	if err != nil {
		return err
	}
	defer closeFiles(files)
	a.keep(keptProtocol, files)
	return nil
}

// withKept adds what the keeper holds of the device to what its server does. What it
// returns is the caller's to close in place of files, also with an error.
func (a *attachment) withKept(ctx context.Context, files []*os.File) ([]*os.File, error) {
	if a.s.keeper == nil || a.rec.Kernel.Transport != keptProtocol {
		return files, nil
	}
	file, err := a.s.keeper.Get(ctx, dirName(a.id))
	if errors.Is(err, block.ErrNotFound) {
		return files, nil
	}
	if err != nil {
		return files, err
	}
	return append(slices.Clone(files), file), nil
}

// dropKept has the keeper let go of a device that is gone.
func (a *attachment) dropKept() {
	if a.s.keeper != nil {
		a.s.keeper.Drop(dirName(a.id))
	}
}
