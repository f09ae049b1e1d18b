// Package vfs is the file system under images and stores: a small interface with a
// host implementation ([Dir]), one in memory that can lose power ([Mem]), and a
// wrapper that injects failures ([Inject]). Everything that touches a store goes
// through it, so that every promise about data can be tested at every step.
//
// # Names
//
// A name is relative to the file system's root, slash-separated and clean: "a/b",
// never "/a", "../a" or "a//b"; "." is the root. Other names fail with fs.ErrInvalid.
// A [Dir] follows no symbolic link out of its root.
//
// # Durability
//
// What is written is visible to every later read at once. It survives power loss
// after File.Sync (contents, size) and FS.SyncDir (names). Until then a crash may
// keep any subset of the written 512-byte sectors, in any order, with the file's
// old or new size, and any subset of the directory's changes. A sector is never torn.
//
// # Errors
//
// Missing and existing names give fs.ErrNotExist and fs.ErrExist; a directory at the new
// name of a rename is fs.ErrExist, too. Negative ranges, names and files that are not
// accepted, and links out of the root give fs.ErrInvalid. Changing a file opened
// ReadOnly gives block.ErrReadOnly, using a closed one fs.ErrClosed. A conflicting lock
// gives block.ErrLocked. What the file system below cannot do gives
// errors.ErrUnsupported. A full store gives syscall.ENOSPC or EDQUOT, and a write may
// have been done in part; block.Errno knows them. A [Dir]'s errors name host paths.
//
// # Locks
//
// A [Dir] locks the bytes that QEMU 2.10 and later lock: a byte each for "I read", "I
// write", "I resize" from 100 on, and for "nobody else may" from 200 on. QEMU's
// read-only users of raw images, among them qemu-img info, let others write and so are
// not excluded; a user who gives --force-share is not either.
//
// # Tests
//
// Package vfstest is the conformance suite that all implementations pass. [Mem] says
// exactly what a crash can leave. A sweep over all failures or crashes is a loop:
//
//	for n := uint64(0); ; n++ {
//		m, reached := newMem(), false
//		run(Inject(m, If(Changing, CrashPoint(n, func() {
//			reached = true
//			check(m.Crash(rand))
//		}))))
//		if !reached {
//			break
//		}
//	}
package vfs
