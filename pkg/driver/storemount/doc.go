// Package storemount knows where a driver's stores are: directories that are there, or
// NFS exports and SMB shares that it mounts.
//
//   - config.go: the file that declares stores
//   - mount.go: mounting them, and why one is not mounted
//   - status.go: how the process that mounts tells the one that doesn't
//
// Each process that opens volumes mounts for itself: the controller and the data plane
// run in containers, whose mount namespaces see one another's mounts only if the whole
// node does, and would leave them behind. A container's own mounts end with it. The node
// plugin opens no volume and mounts nothing; it reads from the data plane's state why a
// store is not there.
//
// Options that take the locks away that keep two nodes from writing one volume are
// refused: nolock and local_lock for NFS, nobrl for SMB.
package storemount
