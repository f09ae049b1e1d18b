package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// QEMU tells others what it does with an image, and what it does not let others do, by
// shared locks on single bytes of the file: byte 100+p says "I use permission p", byte
// 200+p "I do not share permission p". Whoever opens the image takes its own bytes first
// and then looks whether anybody holds a byte that contradicts them. Of two that race at
// least one sees the other. A lock that is only ever shared works on a file opened for
// reading, too.
const (
	lockUsedBase     = 100
	lockUnsharedBase = 200
)

// lockPerms is a set of QEMU's permissions; their bit numbers are the byte offsets.
type lockPerms uint8

const (
	permConsistentRead lockPerms = 1 << 0
	permWrite          lockPerms = 1 << 1
	permResize         lockPerms = 1 << 3
)

// lockBytes is a set of lock bytes.
type lockBytes struct {
	used, unshared lockPerms
}

// bytesOf is what QEMU takes when it opens an image for reading (qemu-img) and for
// writing (qemu-nbd). Neither keeps others from reading inconsistent data on purpose
// ("qemu-img info --force-share").
var bytesOf = map[LockKind]lockBytes{
	LockRead:  {used: permConsistentRead, unshared: permWrite | permResize},
	LockWrite: {used: permConsistentRead | permWrite | permResize, unshared: permWrite | permResize},
}

// String returns what a file is locked for, as in "locked for reading".
func (k LockKind) String() string {
	switch k {
	case LockRead:
		return "reading"
	case LockWrite:
		return "writing"
	}
	return "invalid"
}

// minus returns the bytes of b that are not in other.
func (b lockBytes) minus(other lockBytes) lockBytes {
	return lockBytes{b.used &^ other.used, b.unshared &^ other.unshared}
}

// plus returns the bytes in either.
func (b lockBytes) plus(other lockBytes) lockBytes {
	return lockBytes{b.used | other.used, b.unshared | other.unshared}
}

// contradicting returns the bytes that nobody else may hold beside b.
func (b lockBytes) contradicting() lockBytes {
	return lockBytes{used: b.unshared, unshared: b.used}
}

// each calls f with the offset of every byte, and stops at the first error.
func (b lockBytes) each(f func(off int64) error) error {
	// Used before unshared: a writer holds both, and is to be reported as a writer.
	for set := uint16(b.used) | uint16(b.unshared)<<8; set != 0; set &= set - 1 {
		bit := int64(bits.TrailingZeros16(set))
		off := lockUsedBase + bit
		if bit >= 8 {
			off = lockUnsharedBase + bit - 8
		}
		if err := f(off); err != nil {
			return err
		}
	}
	return nil
}

// Lock takes the bytes of kind that the file does not hold yet, looks for others', and
// only then gives up what kind does not need. So a failed change of kind changes
// nothing, and a change never leaves a gap in which somebody else gets in.
func (f *dirFile) Lock(kind LockKind) error {
	want, ok := bytesOf[kind]
	if !ok {
		return fmt.Errorf("lock %s: kind %d: %w", f.f.Name(), kind, fs.ErrInvalid)
	}
	f.lockMu.Lock()
	defer f.lockMu.Unlock()

	added := want.minus(f.locked)
	err := added.each(func(off int64) error { return f.setLockByte(kind, off, unix.F_RDLCK) })
	if err == nil {
		err = want.contradicting().each(func(off int64) error { return f.testLockByte(kind, off) })
	}
	if err != nil {
		return errors.Join(err, f.dropLockBytes(kind, added))
	}
	surplus := f.locked.minus(want)
	f.locked = f.locked.plus(want)
	if err := f.dropLockBytes(kind, surplus); err != nil {
		return err
	}
	f.locked = want
	return nil
}

// Unlock gives all bytes up.
func (f *dirFile) Unlock() error {
	f.lockMu.Lock()
	defer f.lockMu.Unlock()
	if f.locked == (lockBytes{}) {
		return nil
	}
	if err := f.dropLockBytes(LockRead, f.locked); err != nil {
		return err
	}
	f.locked = lockBytes{}
	return nil
}

func (f *dirFile) dropLockBytes(kind LockKind, set lockBytes) error {
	return set.each(func(off int64) error { return f.setLockByte(kind, off, unix.F_UNLCK) })
}

// setLockByte locks or unlocks one byte, without waiting.
func (f *dirFile) setLockByte(kind LockKind, off int64, typ int16) error {
	lock := unix.Flock_t{Type: typ, Whence: io.SeekStart, Start: off, Len: 1}
	err := f.call("lock", func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return f.lockedBy(kind, "somebody locked the file as a whole")
	}
	return lockFailure(err)
}

// testLockByte returns ErrLocked when somebody else holds the byte.
func (f *dirFile) testLockByte(kind LockKind, off int64) error {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: off, Len: 1}
	err := f.call("test lock", func(fd int) error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock) })
	if err != nil || lock.Type == unix.F_UNLCK {
		return lockFailure(err)
	}
	if off < lockUnsharedBase {
		return f.lockedBy(kind, "it is held for writing")
	}
	if off == lockUnsharedBase {
		return f.lockedBy(kind, "its holder admits no readers")
	}
	return f.lockedBy(kind, "it is held for reading")
}

func (f *dirFile) lockedBy(kind LockKind, how string) error {
	return fmt.Errorf("lock %s for %s: %w: %s", f.f.Name(), kind, block.ErrLocked, how)
}

// lockFailure makes "there are no locks here" recognisable.
func lockFailure(err error) error {
	if errors.Is(err, unix.ENOLCK) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	return err
}
