// Package nbdlocal is the local block server: it serves any [block.Device] in the NBD
// protocol, to foreign clients (fixed newstyle negotiation on a socket) and to the
// kernel (bare transmission phase on a socket pair).
//
// It knows nothing of image formats. Ranges are checked here, once, at the edge.
//
// Subpackages: attach asks the kernel for devices, supervisor runs one server
// process per volume.
package nbdlocal
