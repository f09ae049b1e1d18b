// Package keeper is a tiny process that holds descriptors for others: for each name one,
// so that what the kernel keeps alive by it outlives those who use it. The kernel ends a
// FUSE connection, and fails every request on its device, when the last holder of its
// descriptor is gone; with a keeper the server of a volume, its supervisor and the node
// plugin can be killed together, and the next supervisor gets the descriptor back.
//
// The process reads nothing but names and descriptors, holds no state but these, and has
// next to no reason ever to be replaced. It ends by itself when it has nothing to keep
// and nobody is connected; a descriptor that the kernel has ended counts for nothing. It
// ignores the signals of a node that drains: what it holds is in use until its owner says
// otherwise.
//
// # Protocol, which does not change: SOCK_SEQPACKET unix socket of mode 0600
//
//	P NAME + one descriptor   → P       keep it, in place of one kept under the name
//	G NAME                    → G + a duplicate of the descriptor, or N if there is none
//	D NAME                    → D       forget it
//
// A message is a letter and a name of 1 to 64 letters and digits. Anything else ends the
// connection.
//
// # Files
//
//	keeper.go   the process: Run
//	client.go   its client, which starts it, and again when it has died
//	message.go  messages and sockets
package keeper
