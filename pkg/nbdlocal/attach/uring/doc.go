// Package uring is as much of Linux's io_uring as the ublk transport needs, in plain Go
// on system calls: rings with entries of 64 or 128 bytes, submission and waiting in one
// call, and commands to drivers (IORING_OP_URING_CMD).
//
// # Memory
//
// A ring is memory shared with the kernel. Each side writes one index of each queue and
// reads the other's:
//
//   - submission: this side fills entries, then stores the tail; the kernel takes them
//     and stores the head, inside Enter.
//   - completion: the kernel fills entries, then stores the tail; this side reads them,
//     then stores the head, which gives them back.
//
// An entry must be seen filled by whoever sees the index that covers it, and not be
// overwritten before its reader has let go. The kernel pairs acquiring loads with
// releasing stores for that. Go's atomic loads and stores are sequentially consistent,
// which is stronger, on every architecture; so an index that the other side writes is
// loaded atomically before the entries are touched, and an index of ours is stored
// atomically after them. Go's memory model speaks of other goroutines only, but the
// compiler cannot know who reads a mapping and keeps the same order towards it.
//
// Nothing that the kernel is given the address of lies in memory of the garbage
// collector's: the rings are mappings, and so is what Wait passes besides.
//
// # Concurrency
//
// A Ring is used by one goroutine at a time. With Config.OneThread it is used by one
// thread, the one that made it (runtime.LockOSThread).
package uring
