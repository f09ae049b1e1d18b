package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// attach makes the attachment; on an error nothing of it is left.
func (a *attachment) attach(ctx context.Context, req AttachRequest) error {
	stepCtx, cancel := a.stepContext(ctx)
	defer cancel()
	a.adopted = true
	a.rec = record{Version: recordVersion, BootID: a.s.bootID, Request: req, Phase: Attaching, Since: time.Now()}
	err := a.bringUp(stepCtx)
	if err == nil {
		a.log.Info("attached", "device", a.rec.Kernel.Device, "transport", a.rec.Kernel.Transport, "pid", a.proc.pid)
		return nil
	}
	err = fmt.Errorf("attach %s: %w", a.id, err)
	a.log.Warn("attach", "error", err)
	a.attachErr, a.problem = err, err
	if undoErr := a.rollBack(stepCtx); undoErr != nil {
		a.log.Error("undoing the attach will be tried again", "error", undoErr)
		a.tryLater()
		return errors.Join(err, undoErr)
	}
	return err
}

// bringUp goes the whole way from nothing to serving.
func (a *attachment) bringUp(ctx context.Context) error {
	transport, err := a.s.pickTransport(ctx, a.rec.Request.Transport)
	if err != nil {
		return err
	}
	a.transport = transport
	a.rec.Request.Transport = transport.Name()
	if err := os.MkdirAll(a.dir, 0o700); err != nil {
		return fmt.Errorf("make attachment's directory: %w", err)
	}
	a.s.at("attach: directory")
	if err := a.save(); err != nil {
		return err
	}
	a.s.at("attach: recorded")
	hello, err := a.startServer(ctx)
	if err != nil {
		return err
	}
	spec, err := a.spec(hello.Info)
	if err != nil {
		return err
	}
	procCtx, cancel := a.proc.while(ctx)
	defer cancel()
	st, err := a.transport.Attach(procCtx, spec, a.hooks(a.proc))
	if err != nil {
		return a.transportError(procCtx, err)
	}
	a.s.at("attach: device made")
	a.rec.Kernel = &st
	if err := a.keepServed(ctx); err != nil {
		return err
	}
	if err := a.nowServing(); err != nil {
		return err
	}
	a.s.at("attach: serving")
	return nil
}

// transportError adds why a transport's method ended early.
func (a *attachment) transportError(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	if a.proc != nil && !a.proc.alive() {
		return fmt.Errorf("%w: %w", a.proc.obituary(), err)
	}
	if cause := context.Cause(ctx); !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// spec describes the kernel's device for a server's device.
func (a *attachment) spec(info block.Info) (attach.Spec, error) {
	sector := info.LogicalBlockBytes
	if sector != 512 && sector != 4096 {
		return attach.Spec{}, fmt.Errorf("the device's logical block size is %d bytes, want 512 or 4096: %w", sector, block.ErrUnsupported)
	}
	size := wholeSectors(info.SizeBytes, sector)
	if size <= 0 {
		return attach.Spec{}, fmt.Errorf("the device has %d bytes, want at least one block of %d: %w", info.SizeBytes, sector, block.ErrInvalid)
	}
	return attach.Spec{
		ID:           a.id,
		SizeBytes:    size,
		BlockBytes:   sector,
		ClusterBytes: info.ClusterBytes,
		ReadOnly:     info.ReadOnly || a.rec.Request.ReadOnly,
		CanDiscard:   info.CanDiscard,
		CanZero:      info.CanZero,
	}, nil
}

// wholeSectors is what of a size the kernel can address: a guest's last, partial
// block is not reachable.
func wholeSectors(sizeBytes int64, sectorBytes int) int64 {
	return sizeBytes - sizeBytes%int64(sectorBytes)
}

// hooks are for a transport's method that makes p serve.
func (a *attachment) hooks(p *process) attach.Hooks {
	return attach.Hooks{
		Serve: func(ctx context.Context, protocol string, files []*os.File) error {
			a.s.at("transport: before serve")
			if a.rec.Phase != Attaching { // else: see bringUp
				a.keep(protocol, files)
			}
			ended, err := p.serve(ctx, protocol, files)
			if err != nil {
				return err
			}
			a.ended = ended
			a.s.at("transport: served")
			return nil
		},
		Persist: func(st attach.State) error {
			a.rec.Kernel = &st
			a.s.at("transport: before persist")
			if err := a.save(); err != nil {
				return err
			}
			a.s.at("transport: persisted")
			return nil
		},
	}
}

// rollBack undoes an attach that did not succeed, however far it had come.
func (a *attachment) rollBack(ctx context.Context) error {
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	if _, err := os.Stat(a.dir); os.IsNotExist(err) {
		a.finished = true
		return nil
	}
	if err := a.findServer(ctx); err != nil {
		return err
	}
	if err := a.abort(ctx); err != nil {
		return err
	}
	a.s.at("roll back: device gone")
	if err := a.endServer(ctx); err != nil {
		if a.proc != nil {
			return err
		}
		a.log.Warn("the server of a failed attach", "error", err) // nothing was written by it
	}
	return a.remove(ctx)
}

// abort removes the kernel's objects, whoever uses them.
func (a *attachment) abort(ctx context.Context) error {
	if a.rec.Kernel == nil {
		return nil
	}
	if err := a.findTransport(); err != nil {
		return err
	}
	if err := a.transport.Abort(ctx, *a.rec.Kernel); err != nil {
		return fmt.Errorf("remove device %s: %w", a.rec.Kernel.Device, err)
	}
	a.s.at("abort: done")
	a.dropKept()
	a.rec.Kernel = nil
	return a.save()
}

func (a *attachment) findTransport() error {
	if a.transport != nil {
		return nil
	}
	t := a.s.transport(a.rec.Kernel.Transport)
	if t == nil {
		return fmt.Errorf("transport %q of an existing device is not among this supervisor's: %w", a.rec.Kernel.Transport, block.ErrUnsupported)
	}
	a.transport = t
	return nil
}

// adopt takes over what an earlier supervisor left: a device, and a server or none.
func (a *attachment) adopt(ctx context.Context) error {
	if err := a.findTransport(); err != nil {
		return err
	}
	if err := a.findServer(ctx); err != nil {
		return err
	}
	var files []*os.File
	if a.proc != nil {
		var err error
		if files, a.ended, err = a.proc.files(ctx); err != nil {
			return err
		}
	}
	offered, err := a.withKept(ctx, files)
	if err == nil {
		if err = a.transport.Adopt(ctx, *a.rec.Kernel, offered); err == nil {
			a.keep(a.rec.Kernel.Transport, offered)
		}
	}
	closeFiles(offered)
	if errors.Is(err, block.ErrNotFound) {
		return a.adoptNothing(ctx, err)
	}
	if err != nil {
		return err
	}
	a.s.at("adopt: adopted")
	a.adopted = true
	if a.proc != nil && len(files) > 0 && len(files) >= a.rec.Kernel.Conns && a.rec.Phase != Recovering {
		hello, err := a.proc.hello(ctx)
		if err != nil {
			return err
		}
		a.version = hello.Version
		a.log.Info("adopted", "device", a.rec.Kernel.Device, "pid", a.proc.pid)
		return a.nowServing()
	}
	return a.recover(ctx)
}

// adoptNothing is adopt when the kernel has no such device any more.
func (a *attachment) adoptNothing(ctx context.Context, cause error) error {
	if a.rec.Phase == Detaching { // the earlier supervisor had been told to, and got this far
		a.adopted = true
		return a.finish(ctx)
	}
	return a.lose(ctx, fmt.Errorf("the kernel lost the device while no supervisor ran: %w", cause))
}

// errSucceeded is why recover kills a server that still lives.
var errSucceeded = errors.New("the device is given to another")

// recover gives the device to a new server. If an old one still lives it is killed:
// it may have taken requests that will be given to the new one, and no request may
// be carried out by two.
func (a *attachment) recover(ctx context.Context) error {
	if err := a.setPhase(Recovering); err != nil {
		return err
	}
	a.s.at("recover: recorded")
	// Also one that was started and not recorded: it has the seat.
	if err := a.findServer(ctx); err != nil {
		return err
	}
	if err := a.destroyServer(errSucceeded); err != nil {
		return err
	}
	if outcome, ok := readExit(a.control()); ok && outcome.Lost {
		return a.lose(ctx, outcome.Error.err())
	}
	a.restarts++
	hello, err := a.startServer(ctx)
	if errors.Is(err, block.ErrFenced) {
		return a.lose(ctx, err)
	}
	if err != nil {
		a.fails++
		return err
	}
	if err := a.checkSuccessor(hello.Info); err != nil {
		a.fails++
		return errors.Join(err, a.endServer(ctx))
	}
	procCtx, cancel := a.proc.while(ctx)
	defer cancel()
	err = a.transport.Recover(procCtx, *a.rec.Kernel, a.hooks(a.proc))
	if errors.Is(err, block.ErrNotFound) {
		return a.lose(ctx, fmt.Errorf("the kernel lost the device: %w", err))
	}
	if err != nil {
		err = a.transportError(procCtx, err)
		return errors.Join(err, a.destroyServer(err))
	}
	a.s.at("recover: recovered")
	a.recoveries++
	if err := a.nowServing(); err != nil {
		return err
	}
	a.s.at("recover: serving")
	a.log.Info("recovered", "device", a.rec.Kernel.Device, "pid", a.proc.pid)
	return nil
}

// checkSuccessor refuses a new server whose device would turn requests that wait into
// errors: one that fails to open is tried again, with nobody hurt.
func (a *attachment) checkSuccessor(info block.Info) error {
	k := a.rec.Kernel
	if info.SizeBytes < k.SizeBytes {
		return fmt.Errorf("the image has %d bytes, and its device %d: %w", info.SizeBytes, k.SizeBytes, block.ErrCorrupt)
	}
	if info.ReadOnly && !k.ReadOnly {
		return fmt.Errorf("the image can only be read now, and its device can be written: %w", block.ErrReadOnly)
	}
	return nil
}

// lose gives the device up: the kernel dropped it, or another node owns the volume.
func (a *attachment) lose(ctx context.Context, cause error) error {
	a.rec.Fenced = errors.Is(cause, block.ErrFenced)
	if outcome, ok := readExit(a.control()); ok && outcome.Lost {
		a.rec.Fenced, cause = true, outcome.Error.err()
	}
	a.log.Error("the device is lost", "device", a.rec.Kernel.Device, "cause", cause)
	a.rec.Lost = cause.Error()
	if err := a.setPhase(Lost); err != nil {
		return err
	}
	a.s.at("lose: recorded")
	a.unpark(Attachment{}, errRetry)
	return a.quiesce(ctx)
}

// quiesce ends what is left of a lost device: requests that wait in the kernel fail,
// and the server closes its image.
func (a *attachment) quiesce(ctx context.Context) error {
	if err := a.findServer(ctx); err != nil {
		return err
	}
	if err := a.abort(ctx); err != nil {
		return err
	}
	a.s.at("lose: device gone")
	a.adopted = true
	a.publish()
	return a.stopServer(ctx)
}

// stopServer stops the server of a device that is gone, if there is one. That its
// image could not be closed is for a later detach to deal with; that it does not end
// is an error.
func (a *attachment) stopServer(ctx context.Context) error {
	if a.proc == nil {
		return nil
	}
	if err := a.proc.stop(ctx); err != nil {
		a.log.Warn("closing the image of a lost device", "error", err)
	}
	if a.proc.alive() {
		return fmt.Errorf("server process %d does not stop: %w", a.proc.pid, block.ErrBusy)
	}
	a.setProcess(nil)
	return nil
}

// resize tells the kernel the size that the server's device has now.
func (a *attachment) resize(ctx context.Context) error {
	ctx, cancel := a.stepContext(ctx)
	defer cancel()
	if a.rec.Phase != Serving || !a.adopted || !a.proc.alive() {
		return fmt.Errorf("resize %s: it is %s: %w", a.id, a.rec.Phase, block.ErrBusy)
	}
	hello, err := a.proc.hello(ctx)
	if err != nil {
		return fmt.Errorf("resize %s: %w", a.id, err)
	}
	size := wholeSectors(hello.Info.SizeBytes, a.rec.Kernel.BlockBytes)
	if size < a.rec.Kernel.SizeBytes {
		return fmt.Errorf("resize %s from %d to %d bytes: a device in use can only grow: %w", a.id, a.rec.Kernel.SizeBytes, size, block.ErrInvalid)
	}
	procCtx, cancelProc := a.proc.while(ctx)
	defer cancelProc()
	a.s.at("resize: begun")
	st, err := a.transport.Resize(procCtx, *a.rec.Kernel, size)
	if err != nil {
		return fmt.Errorf("resize %s: %w", a.id, a.transportError(procCtx, err))
	}
	a.s.at("resize: done")
	a.rec.Kernel = &st
	return a.save()
}

// detach removes the device and closes the image.
func (a *attachment) detach(ctx context.Context, force bool) error {
	if force {
		return a.detachByForce(ctx)
	}
	ctx, cancel := a.stepContext(ctx)
	defer cancel()
	if a.rec.Phase == Attaching {
		return a.rollBack(ctx)
	}
	if a.rec.Phase != Lost && a.rec.Kernel != nil && !a.adopted {
		if err := a.adopt(ctx); err != nil || a.finished {
			return err
		}
	}
	if a.rec.Phase != Lost && a.rec.Kernel != nil {
		if err := a.detachDevice(ctx); err != nil {
			if a.rec.Phase != Serving {
				a.problem = err
			}
			return fmt.Errorf("detach %s: %w", a.id, err)
		}
	}
	if err := a.finish(ctx); err != nil {
		a.problem = err
		return fmt.Errorf("detach %s: %w", a.id, err)
	}
	return nil
}

// detachDevice removes the kernel's device once its caches are flushed, for which a
// server must be there: one that dies meanwhile is replaced. Afterwards the device is
// gone, or lost.
func (a *attachment) detachDevice(ctx context.Context) error {
	for {
		if a.rec.Phase == Recovering || a.proc == nil || !a.proc.alive() {
			if err := a.recover(ctx); err != nil {
				a.interrupted(err) // go on trying, also after this
				return fmt.Errorf("its caches must be flushed, and no server runs: %w", err)
			}
			if a.rec.Phase == Lost {
				return nil
			}
		}
		if err := a.setPhase(Detaching); err != nil {
			return err
		}
		a.s.at("detach: recorded")
		procCtx, cancel := a.proc.while(ctx)
		err := a.transport.Detach(procCtx, *a.rec.Kernel)
		cancel()
		if errors.Is(err, attach.ErrLingers) { // nothing of it is ours any more
			a.log.Warn("detach", "problem", err)
			err = nil
		}
		if err == nil {
			break
		}
		if !a.proc.alive() && ctx.Err() == nil {
			continue
		}
		if errors.Is(err, block.ErrBusy) { // nothing has changed
			return errors.Join(err, a.setPhase(Serving))
		}
		return a.transportError(ctx, err)
	}
	a.s.at("detach: device gone")
	a.rec.Kernel = nil
	return a.save()
}

// finish closes the image of an attachment without a device, and forgets it.
func (a *attachment) finish(ctx context.Context) error {
	if err := a.findServer(ctx); err != nil {
		return err
	}
	if err := a.abort(ctx); err != nil { // what may be left beside the device
		return err
	}
	if err := a.closeImage(ctx); err != nil {
		return fmt.Errorf("the device is gone, and closing the image: %w", err)
	}
	a.s.at("detach: image closed")
	return a.remove(ctx)
}

// closeImage makes sure that the image is closed properly. If its server died before
// that was done, a new one opens it, replays what the old one left, and closes it.
func (a *attachment) closeImage(ctx context.Context) error {
	if a.proc != nil && a.proc.alive() {
		a.s.at("detach: before stop")
		if !a.rec.Fenced {
			_, _ = a.proc.hello(ctx) // one that was only just started has not opened it yet
		}
		err := a.proc.stop(ctx)
		if a.proc.alive() {
			return err
		}
		a.setProcess(nil)
		if outcome, ok := readExit(a.control()); ok && err != nil {
			return outcome.Error.err() // it could not close the image, and said so
		}
	}
	a.setProcess(nil)
	outcome, _ := readExit(a.control())
	if outcome.Closed || a.rec.Fenced {
		return nil
	}
	if _, err := a.startServer(ctx); err != nil {
		return err
	}
	err := a.proc.stop(ctx)
	if !a.proc.alive() {
		a.setProcess(nil)
	}
	return err
}

// detachByForce removes everything without waiting for requests, users or stores. It
// fails only if a process cannot be killed or the kernel refuses.
func (a *attachment) detachByForce(ctx context.Context) error {
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	if err := a.findServer(ctx); err != nil {
		a.log.Warn("detach by force", "error", err)
	}
	if err := a.setPhase(Detaching); err != nil {
		return fmt.Errorf("detach %s by force: %w", a.id, err)
	}
	if err := a.abort(ctx); err != nil {
		// A ublk device goes once its server has answered what it took, or is gone.
		if killErr := a.destroyServer(err); killErr != nil {
			return fmt.Errorf("detach %s by force: %w", a.id, errors.Join(err, killErr))
		}
		again, cancelAgain := cleanupContext(ctx)
		defer cancelAgain()
		ctx = again
		if err := a.abort(ctx); err != nil {
			return fmt.Errorf("detach %s by force: %w", a.id, err)
		}
	}
	if err := a.endServer(ctx); err != nil {
		if a.proc != nil {
			return fmt.Errorf("detach %s by force: %w", a.id, err)
		}
		a.log.Error("detached by force; what was written last may be lost", "error", err)
	}
	if err := a.remove(ctx); err != nil {
		return fmt.Errorf("detach %s by force: %w", a.id, err)
	}
	return nil
}

// discard clears away an attachment without a device for a new one with its ID,
// whose server opens the image and replays what the old one left.
func (a *attachment) discard(ctx context.Context) error {
	ctx, cancel := a.stepContext(ctx)
	defer cancel()
	if err := a.findServer(ctx); err != nil {
		return err
	}
	if err := a.abort(ctx); err != nil {
		return err
	}
	if err := a.stopServer(ctx); err != nil {
		return err
	}
	return a.remove(ctx)
}
