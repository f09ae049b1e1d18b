package attach

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	// Devices from ublkFirstIndex to before ublkEndIndex are ours by convention: other
	// programs let the driver choose, which starts at 0. Minor numbers have 20 bits.
	ublkFirstIndex = 1024
	ublkEndIndex   = 1 << 20

	// ublkMaxQueues is how many queues a device has, where there are as many
	// processors. More of them share the work of no more storage.
	ublkMaxQueues = 4

	// ublkMaxBulkBytes bounds what one discard or zeroing makes a server do. Kernels
	// before 6.11 cut one of 4 GiB short.
	ublkMaxBulkBytes = 1 << 30

	// ublkTimerMillis is how often the driver looks at a request that is not answered.
	// A server that dies while its whole queue is with it is noticed only then by
	// kernels before 6.16; to one that is merely slow nothing happens.
	ublkTimerMillis = 2000

	// ublkRecoveryLimit is how long the kernel may take to be done with a dead server.
	ublkRecoveryLimit = 30 * time.Second

	// ublkAftermath is how long kernels before 6.16 are left to give back the commands of a
	// dead server, which they do when they say already that they are done with it.
	ublkAftermath = 100 * time.Millisecond

	ublkNodeLimit = 10 * time.Second

	// ublkMaxTries bounds the search for a free number.
	ublkMaxTries = 256
)

// ublkTransport makes devices of the kernel's ublk driver.
//
// Whoever has /dev/ublkcN open and asks for requests there is the device's server. This
// side opens it, because a server may not, and the kernel wants START_DEV and
// END_USER_RECOVERY to name the process that did; it passes the descriptor on and keeps
// none: the driver takes a server for gone when the last descriptor is.
//
// Such a device waits for a server as long as it takes, and reissues what a dead one had
// taken: so no process has to be kept alive for it. A device is recognised by a hash of
// the ID, which the driver keeps among the server's own flags.
type ublkTransport struct {
	choosing sync.Mutex // an index
}

// NewUBLK returns the ublk transport. It needs root, the module ublk_drv, io_uring, and
// Linux 6.5; devices can be resized from Linux 6.16 on. The process must see itself under
// the same number as the host does (hostPID), on kernels from 6.16 to early 2026.
func NewUBLK() Transport { return &ublkTransport{} }

func (*ublkTransport) Name() string { return "ublk" }

func ublkName(index int) string     { return fmt.Sprintf("ublkb%d", index) }
func ublkCharPath(index int) string { return fmt.Sprintf("/dev/ublkc%d", index) }

func ublkCharSysfs(index int) string { return fmt.Sprintf("/sys/class/ublk-char/ublkc%d", index) }

// ublkHash is what the driver keeps of an ID. It is never 0, which is another program's.
func ublkHash(id string) uint64 {
	sum := sha256.Sum256([]byte("csi-imgdisk ublk " + id))
	return binary.LittleEndian.Uint64(sum[:]) | 1
}

// find returns what the driver knows of the state's device; ErrNotFound if it has none, or
// another one's under its number.
func (*ublkTransport) find(ctx context.Context, st State) (ublkDevInfo, error) {
	if st.Index < ublkFirstIndex {
		return ublkDevInfo{}, fmt.Errorf("ublk: no device was made for it: %w", block.ErrNotFound)
	}
	info, err := ublkInfo(ctx, st.Index)
	if err == nil && info.ServerFlags != ublkHash(st.ID) {
		err = fmt.Errorf("ublk: device %d is another volume's: %w", st.Index, block.ErrNotFound)
	}
	return info, err
}

// findStarted is find for a device that users may have.
func (t *ublkTransport) findStarted(ctx context.Context, st State) (ublkDevInfo, error) {
	info, err := t.find(ctx, st)
	if err == nil && (st.Device == "" || info.State == ublkDead) {
		err = fmt.Errorf("ublk: device %d was stopped, or never started: %w", st.Index, block.ErrNotFound)
	}
	return info, err
}

// findByID returns the device with this ID, whatever its number.
func (t *ublkTransport) findByID(ctx context.Context, id string) (index int, ok bool) {
	paths, _ := filepath.Glob("/sys/class/ublk-char/ublkc*")
	for _, p := range paths {
		index, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(p), "ublkc"))
		if err != nil || index < ublkFirstIndex {
			continue
		}
		if info, err := ublkInfo(ctx, index); err == nil && info.ServerFlags == ublkHash(id) {
			return index, true
		}
	}
	return 0, false
}

func (t *ublkTransport) Attach(ctx context.Context, spec Spec, hooks Hooks) (State, error) {
	if err := checkSpec(spec); err != nil {
		return State{}, err
	}
	if index, ok := t.findByID(ctx, spec.ID); ok {
		return State{}, fmt.Errorf("attach %s: %w as /dev/%s", spec.ID, block.ErrExists, ublkName(index))
	}
	features, err := ublkFeatures(ctx)
	if err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	st := State{Spec: spec, Transport: t.Name()}
	if err := t.add(ctx, &st, features, hooks); err != nil {
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, err)
	}
	if err := t.start(ctx, &st, hooks); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), ublkQuick)
		defer cancel()
		return State{}, fmt.Errorf("attach %s: %w", spec.ID, errors.Join(err, t.remove(undo, st)))
	}
	return st, nil
}

// add makes a device at the first index that is free.
func (t *ublkTransport) add(ctx context.Context, st *State, features uint64, hooks Hooks) error {
	t.choosing.Lock()
	defer t.choosing.Unlock()
	tried := 0
	for index := ublkFirstIndex; index < ublkEndIndex; index++ {
		if exists(ublkCharSysfs(index)) {
			continue
		}
		// Before the device exists: who finds this state after a crash recognises the
		// device by the hash.
		st.Index = index
		if err := hooks.Persist(*st); err != nil {
			return err
		}
		info := ublkDevInfo{
			Queues: ublkQueues(features), Depth: ublkDepth,
			MaxIOBytes: ublkMaxRequestBytes, Dev: uint32(index),
			Flags:       ublkNeeded | features&(ublkWanted|ublkHasTryStop|ublkNoPartScan),
			ServerFlags: ublkHash(st.ID),
		}
		err := ublkCall{name: "ADD_DEV", number: ublkAddDev, dev: uint32(index), payload: info}.do(ctx)
		switch {
		case errors.Is(err, unix.EACCES):
			return fmt.Errorf("%w: the driver's limit of devices is reached: raise /sys/module/ublk_drv/parameters/ublks_max", err)
		case !errors.Is(err, unix.EEXIST):
			return err
		}
		// Another process was faster, or a device that is gone still has its server.
		if tried++; tried == ublkMaxTries {
			return err
		}
	}
	return fmt.Errorf("ublk: all numbers from %d to %d are taken: %w", ublkFirstIndex, ublkEndIndex-1, block.ErrBusy)
}

// ublkQueues is how many queues a new device gets. Kernels before 6.16 crash when a device
// is to be recovered whose server died when one queue had asked for requests and another had
// not: there it has one.
func ublkQueues(features uint64) uint16 {
	if features&ublkHasQuiesce == 0 {
		return 1
	}
	return uint16(min(runtime.NumCPU(), ublkMaxQueues))
}

// start completes an added device, and the state.
func (t *ublkTransport) start(ctx context.Context, st *State, hooks Hooks) error {
	params := ublkParamsOf(st.Spec)
	if err := (ublkCall{name: "SET_PARAMS", number: ublkSetParams, dev: uint32(st.Index), payload: params}).do(ctx); err != nil {
		return err
	}
	// It does not look for partitions: see renounceAdmin.
	start := ublkCall{name: "START_DEV", number: ublkStartDev, dev: uint32(st.Index), data: uint64(os.Getpid())}
	if err := start.around(ctx, func(ctx context.Context) error { return t.serve(ctx, st.Index, hooks) }); err != nil {
		return ublkPIDError(err)
	}
	if !ublkHasServer(st.Index) {
		return fmt.Errorf("the server of /dev/%s has ended: %w", ublkName(st.Index), block.ErrClosed)
	}
	name := ublkName(st.Index)
	if err := setQueue(name, "io_timeout", ublkTimerMillis); err != nil {
		return err
	}
	if err := awaitNode(ctx, "/dev/"+name); err != nil {
		return err
	}
	if err := checkDeviceSize(name, st.SizeBytes); err != nil {
		return err
	}
	st.Device = "/dev/" + name
	return hooks.Persist(*st)
}

// ublkHasServer says whether anybody has the device open as its server.
func ublkHasServer(index int) bool {
	fd, err := unix.Open(ublkCharPath(index), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err != nil // EBUSY: there is one server at a time
}

// serve opens the device for a server and hands it over. Nothing of it is kept here.
func (t *ublkTransport) serve(ctx context.Context, index int, hooks Hooks) error {
	path := ublkCharPath(index)
	if err := awaitNode(ctx, path); err != nil {
		return err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("ublk: open %s: %w", path, err)
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	return hooks.Serve(ctx, t.Name(), []*os.File{file})
}

// awaitNode waits until udev, or the kernel, has made a device node.
func awaitNode(ctx context.Context, path string) error {
	err := poll(ctx, ublkNodeLimit, func() (bool, error) { return exists(path), nil })
	if errors.Is(err, errPollTimeout) {
		return fmt.Errorf("%s does not appear: give this process the host's /dev: %w", path, block.ErrUnsupported)
	}
	return err
}

// ublkPIDError explains the error of a command that names this process, where it can.
func ublkPIDError(err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: the kernel may know process %d by another number: run it with hostPID: true", err, os.Getpid())
	}
	return err
}

func ublkParamsOf(spec Spec) ublkParams {
	p := ublkParams{Len: ublkParamsBytes, Types: ublkTypeBasic}
	const page = 4096
	p.Basic.Attrs = ublkVolatileCache | ublkFUA
	if spec.ReadOnly {
		p.Basic.Attrs |= ublkReadOnly
	}
	p.Basic.LogicalShift = uint8(bits.TrailingZeros(uint(spec.BlockBytes)))
	p.Basic.PhysicalShift = uint8(bits.TrailingZeros(uint(page)))
	p.Basic.OptShift, p.Basic.MinShift = p.Basic.PhysicalShift, p.Basic.PhysicalShift
	p.Basic.MaxSectors = ublkMaxRequestBytes / sectorBytes
	p.Basic.DevSectors = uint64(spec.SizeBytes / sectorBytes)
	if spec.ReadOnly || !spec.CanDiscard && !spec.CanZero {
		return p
	}
	p.Types |= ublkTypeDiscard
	p.Discard.MaxSegments = 1
	p.Discard.Granularity = page
	if c := spec.ClusterBytes; c > page && c <= ublkMaxBulkBytes && c&(c-1) == 0 {
		p.Discard.Granularity = uint32(c)
	}
	if spec.CanDiscard {
		p.Discard.MaxSectors = ublkMaxBulkBytes / sectorBytes
	}
	if spec.CanZero {
		p.Discard.MaxZeroesSectors = ublkMaxBulkBytes / sectorBytes
	}
	return p
}

// Adopt needs no descriptors.
func (t *ublkTransport) Adopt(ctx context.Context, st State, _ []*os.File) error {
	if _, err := t.findStarted(ctx, st); err != nil {
		return fmt.Errorf("adopt %s: %w", st.ID, err)
	}
	return nil
}

// Recover hands the device to a new server.
//
// Kernels before 6.16 have a hole here: if the new server dies when it has asked for all
// requests and before END_USER_RECOVERY takes effect, the device is taken for served and
// cannot be recovered again. The command is there first and only waits for the requests to
// be asked for, and a dying server takes longer than that to be noticed.
func (t *ublkTransport) Recover(ctx context.Context, st State, hooks Hooks) error {
	if err := t.recover(ctx, st, hooks); err != nil {
		return fmt.Errorf("recover %s: %w", st.ID, err)
	}
	return nil
}

func (t *ublkTransport) recover(ctx context.Context, st State, hooks Hooks) error {
	if _, err := t.findStarted(ctx, st); err != nil {
		return err
	}
	err := poll(ctx, ublkRecoveryLimit, func() (bool, error) { return t.quiesced(ctx, st) })
	if err == nil {
		err = poll(ctx, ublkRecoveryLimit, func() (bool, error) { return t.beginRecovery(ctx, st) })
	}
	if errors.Is(err, errPollTimeout) && ublkHasServer(st.Index) {
		err = fmt.Errorf("the kernel is not done with the last server of %s: is it still there?: %w", st.Device, block.ErrBusy)
	}
	if errors.Is(err, errPollTimeout) {
		err = fmt.Errorf("%s has no server, and the kernel (%s) has not noticed: its requests wait until it is detached by force: %w", st.Device, kernelRelease(), block.ErrBusy)
	}
	if err != nil {
		return err
	}
	end := ublkCall{name: "END_USER_RECOVERY", number: ublkEndRecovery, dev: uint32(st.Index), data: uint64(os.Getpid())}
	return ublkPIDError(end.around(ctx, func(ctx context.Context) error { return t.serve(ctx, st.Index, hooks) }))
}

// quiesced tells whether the driver is done with the last server. Before Linux 6.16 it says so
// while it still walks through that server's commands: START_USER_RECOVERY, which forgets
// them, makes it follow a null pointer then, and would come at just that moment if it
// waited for the device's lock meanwhile.
func (t *ublkTransport) quiesced(ctx context.Context, st State) (bool, error) {
	info, err := t.findStarted(ctx, st)
	if err != nil || info.State != ublkQuiesced {
		return false, err
	}
	features, err := ublkFeatures(ctx)
	if err != nil || features&ublkHasQuiesce != 0 {
		return err == nil, err
	}
	select {
	case <-time.After(ublkAftermath):
		return true, nil
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// beginRecovery makes the driver ready for a new server, once it is done with the last.
func (t *ublkTransport) beginRecovery(ctx context.Context, st State) (bool, error) {
	// It waits for the device's lock, which the kernel holds until it is done with what the
	// last server had taken.
	ctx, cancel := context.WithTimeout(ctx, ublkQuick)
	defer cancel()
	err := ublkCall{name: "START_USER_RECOVERY", number: ublkStartRecovery, dev: uint32(st.Index), waits: true}.do(ctx)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENODEV):
		return false, fmt.Errorf("%w: %w", block.ErrNotFound, err)
	case errors.Is(err, unix.EBUSY):
		return false, nil
	case errors.Is(err, unix.EINVAL):
		// No queue has been asked for requests since the last START_USER_RECOVERY: it
		// still holds, if its server is gone.
		info, infoErr := t.findStarted(ctx, st)
		if infoErr == nil && info.State == ublkQuiesced {
			return true, nil
		}
		return false, errors.Join(err, infoErr)
	}
	return false, err
}

// Resize only grows.
func (t *ublkTransport) Resize(ctx context.Context, st State, sizeBytes int64) (State, error) {
	if err := checkGrowth(st, sizeBytes); err != nil {
		return st, err
	}
	if err := t.resize(ctx, st, sizeBytes); err != nil {
		return st, fmt.Errorf("resize %s: %w", st.ID, err)
	}
	st.SizeBytes = sizeBytes
	return st, nil
}

func (t *ublkTransport) resize(ctx context.Context, st State, sizeBytes int64) error {
	info, err := t.findStarted(ctx, st)
	if err != nil {
		return err
	}
	features, err := ublkFeatures(ctx)
	switch {
	case err != nil:
		return err
	case features&ublkHasUpdateSize == 0:
		return fmt.Errorf("this kernel's ublk (%s) can't resize a device in use: detach %s and attach it again, which gives it its new size, or use a kernel from Linux 6.16 on, or transport nbd: %w", kernelRelease(), st.Device, block.ErrUnsupported)
	case info.State != ublkLive: // some kernels crash
		return fmt.Errorf("%s has no server at the moment: %w", st.Device, block.ErrBusy)
	}
	ctx, cancel := context.WithTimeout(ctx, ublkQuick)
	defer cancel()
	err = ublkCall{name: "UPDATE_SIZE", number: ublkUpdateSize, dev: uint32(st.Index), data: uint64(sizeBytes / sectorBytes), waits: true}.do(ctx)
	if err != nil {
		return err
	}
	return checkDeviceSize(ublkName(st.Index), sizeBytes)
}

func (t *ublkTransport) Detach(ctx context.Context, st State) error {
	info, err := t.find(ctx, st)
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	if err == nil && info.State != ublkDead {
		err = within(ctx, func() error { return t.release(ctx, st, info) })
	}
	if err == nil {
		err = t.remove(ctx, st)
	}
	if err == nil {
		err = t.awaitGone(ctx, st)
	}
	if err != nil {
		return fmt.Errorf("detach %s: %w", st.ID, err)
	}
	return nil
}

// release flushes and stops the device, if nobody else uses it.
func (t *ublkTransport) release(ctx context.Context, st State, info ublkDevInfo) error {
	name := ublkName(st.Index)
	fd, err := t.flushIdle(ctx, name)
	if err != nil {
		return err
	}
	if info.Flags&ublkHasTryStop == 0 {
		// Held exclusively open while it is stopped, so that nobody can mount it.
		defer unix.Close(fd)
		return t.stop(ctx, st)
	}
	unix.Close(fd)
	err = ublkCall{name: "TRY_STOP_DEV", number: ublkTryStopDev, dev: uint32(st.Index), waits: true}.do(ctx)
	if errors.Is(err, unix.EBUSY) {
		return busyError(name)
	}
	return ublkGoneIsDone(err)
}

// flushIdle opens a device exclusively that nobody uses, and makes what was written to it
// durable.
func (*ublkTransport) flushIdle(ctx context.Context, name string) (fd int, err error) {
	if fd, err = openExclusive(ctx, name); err != nil {
		return -1, err
	}
	// Exclusively open says that it is not mounted. Who has merely opened it, the
	// kernel doesn't tell.
	err = poll(ctx, probeGrace, func() (bool, error) {
		return len(openersOf(name)) == 0 && len(stackedOn(name)) == 0, nil
	})
	if errors.Is(err, errPollTimeout) {
		err = busyError(name)
	}
	if err == nil {
		err = flushDevice(ctx, fd, "/dev/"+name)
	}
	if err == nil {
		err = ctx.Err() // nobody waits for it any more: don't surprise them
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// stop ends the block device. It waits for requests that the server has taken; with no
// server, those that wait fail.
func (*ublkTransport) stop(ctx context.Context, st State) error {
	return ublkGoneIsDone(ublkCall{name: "STOP_DEV", number: ublkStopDev, dev: uint32(st.Index), waits: true}.do(ctx))
}

// remove removes a stopped device. Its number is free once its server, too, has closed it.
func (*ublkTransport) remove(ctx context.Context, st State) error {
	err := ublkCall{name: "DEL_DEV_ASYNC", number: ublkDelDevAsync, dev: uint32(st.Index)}.do(ctx)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) { // before Linux 6.9
		err = ublkCall{name: "DEL_DEV", number: ublkDelDev, dev: uint32(st.Index), waits: true}.do(ctx)
	}
	return ublkGoneIsDone(err)
}

func ublkGoneIsDone(err error) error {
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// awaitGone waits until the kernel shows nothing of the device. Its number may stay taken
// for longer: until its server has closed it.
func (*ublkTransport) awaitGone(ctx context.Context, st State) error {
	err := poll(ctx, lingerPatience, func() (bool, error) {
		return !exists(ublkCharSysfs(st.Index)) && !exists("/sys/block/"+ublkName(st.Index)), nil
	})
	if errors.Is(err, errPollTimeout) {
		return fmt.Errorf("%w: %v", ErrLingers, busyError(ublkName(st.Index)))
	}
	return err
}

// Abort returns while somebody may still have the device open: until they close it, it
// fails every request. A server that is there must answer the requests it has taken, or be
// gone: the kernel waits for them, and with one that is stuck in a store this fails when
// ctx ends. It is done once the server is killed.
func (t *ublkTransport) Abort(ctx context.Context, st State) error {
	info, err := t.find(ctx, st)
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	if err == nil && info.State != ublkDead {
		err = t.stop(ctx, st)
	}
	if err == nil {
		err = t.remove(ctx, st)
	}
	if err != nil {
		return fmt.Errorf("abort %s: %w", st.ID, err)
	}
	return nil
}
