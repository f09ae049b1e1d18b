// Package confine takes from a process what it does not need, for good: a volume's server
// parses images that strangers made, and serves clients that may be hostile. If one of
// them gets the better of it, it has what the server has:
//
//   - of the file system, the directories and files it was given (Landlock);
//   - system calls that read, write and wait, on descriptors that are open or that the
//     first point allows it to open: no sockets, programs, mounts, other processes'
//     memory, code made at run time (seccomp). Rings of io_uring get past that, so there
//     are none but those that were made before, each limited to what it is for;
//   - no capabilities but those that let it reach its own files whoever owns them, and no
//     way to get others (no_new_privs).
//
// Everything applies to all threads, and to what they start.
//
//	confine.go   Process
//	landlock.go  the file system
//	seccomp.go   system calls; seccomp_*.go: what an architecture has besides
package confine
