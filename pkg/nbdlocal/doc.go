// Package nbdlocal is the local block server: it serves any [block.Device] in the NBD
// protocol, to foreign clients (fixed newstyle negotiation on a socket) and to the
// kernel (bare transmission phase on a socket pair).
//
// It knows nothing of image formats. Ranges are checked here, once, at the edge.
//
// # Files, in the order in which to read them
//
//   - protocol.go: the protocol's numbers
//   - server.go: [Server], what callers see
//   - handshake.go: how a foreign client gets to the transmission phase
//   - conn.go: one connection and its workers, the heart of it
//   - receive.go: from bytes to requests; reply.go, send.go: from requests to bytes
//   - request.go: one request: is it acceptable, and carrying it out
//   - ranges.go: the order of overlapping writes
//   - pace.go: whether a device answers at once or keeps a thread waiting
//   - watch.go: what happens when it suddenly doesn't answer
//   - arena.go: buffers outside the garbage collector's reach
//   - socket.go, futex.go: system calls
//   - stats.go: counters
//
// # How a connection works
//
// A connection has up to a fixed number of workers, threads that are interchangeable. Each
// looks for the most urgent thing there is to do: send replies, carry out a request,
// receive more requests; and sleeps when there is none. One at a time receives, and
// takes all the requests that one system call yields; one at a time sends, and sends
// all the replies there are. With a device that answers from memory a single worker
// does everything and is never handed anything: one receive, one send, and the
// device's own calls. With a device that makes its callers wait, workers wake one
// another so that as many requests as there are workers wait at the same time. Which
// of the two it is, is measured (pace.go), and a device that stops answering at once
// is noticed by a watch within milliseconds (watch.go).
//
// A request occupies one of a fixed number of slots from its header's arrival until
// its reply is sent. When slots or buffers run out, the connection stops receiving.
//
// # Order
//
// Overlapping writes in flight, on all connections a Server ever served, are carried
// out in the order in which they were received. The kernel depends on it: it resends
// a request that takes too long on another connection, while the first still runs;
// were the first to finish last, it would overwrite what had been written since.
// A write that a kernel connection delivers after the kernel has given that
// connection up is not carried out at all, for the same reason.
//
// A flush on one connection covers the writes acknowledged on all: they share one
// device.
//
// [block.Device]: the contract of package block
package nbdlocal
