// Package nbdlocal is the local block server: it serves any [block.Device] in the NBD
// protocol, to foreign clients (fixed newstyle negotiation on a socket, by TLS if that
// is wanted) and to the kernel (bare transmission phase on a socket pair).
//
// It knows nothing of image formats. Ranges are checked here, once, at the edge.
//
// # Files, in the order in which to read them
//
//   - protocol.go: the protocol's numbers
//   - server.go: [Server], a device and its connections
//   - exports.go: [Exports], servers that foreign clients choose from by name
//   - handshake.go, contexts.go: how a foreign client gets to the transmission phase
//   - conn.go: one connection and its workers, the heart of it
//   - receive.go: from bytes to requests; reply.go, send.go: from requests to bytes
//   - request.go: one request: is it acceptable, and carrying it out
//   - status.go: block status
//   - ranges.go: the order of overlapping writes
//   - spin.go: whether to look for the next request or to sleep until it comes
//   - pace.go: whether a device answers at once or keeps a thread waiting
//   - holes.go: whether to ask for holes before a large read
//   - watch.go: what happens when it suddenly doesn't answer
//   - arena.go: buffers outside the garbage collector's reach
//   - socket.go, futex.go: system calls
//   - tls.go, certificates.go: a tunnel from TLS to a bare socket
//   - limit.go: logging what hostile clients cause, at a bounded rate
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
// A client that sends one request at a time is served by a worker that looks for the
// next for some microseconds before it sleeps, if that has turned out to be faster.
//
// A program that serves should give the Go scheduler more processors (GOMAXPROCS) than
// the machine has, as many as there are workers: they wait in system calls, which must
// not each time cost another thread's wake.
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
// # What is spoken
//
// The NBD protocol as of 2025: fixed newstyle with LIST, INFO, GO and EXPORT_NAME; simple
// and structured replies, and extended headers; block status in base:allocation and
// qemu:allocation-depth, with extended headers also for a choice of them; flush, FUA,
// trim, cache, write zeroes with NO_HOLE and FAST_ZERO; multi-conn. Not its experimental
// resizing, dirty bitmaps, and the oldstyle handshake.
//
// # Hostile clients
//
// Everything a client announces is bounded before memory is spent on it: options, names,
// queries, payloads. A connection's buffers are a fixed arena, its requests a fixed
// number of slots. A request that makes no sense is answered with an error as long as it
// is clear where the next one begins, and ends the connection otherwise. So does a
// payload of more than twice what may be written at once. Clients in the handshake have
// a deadline and a number of their own, so that they keep nobody out.
//
// [block.Device]: the contract of package block
package nbdlocal
