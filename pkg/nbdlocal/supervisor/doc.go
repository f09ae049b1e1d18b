// Package supervisor keeps volumes attached: one server process per volume, started,
// watched and restarted, with the kernel transport of package attach in front.
//
// # Processes
//
//	node plugin ──(api.sock: HTTP+JSON, Client)──► supervisor ──(server.sock: Server protocol)──► server, one per volume
//	                                                   │                                              │
//	                                                   └── attach.Transport ── kernel ◄── descriptors ┘
//
// The supervisor has the privileges (netlink, mount, loop) and never opens an image;
// a server opens one image and has no privileges. Any of the processes may be killed
// at any time: applications see a pause, not an error.
//
//   - A server died: the supervisor waits until it is gone (pidfd), starts a new one
//     and lets the transport recover the device. Restarts back off up to a few
//     seconds and never stop: the reason is in the attachment's status.
//   - The supervisor died: servers go on serving. The next supervisor reads the state
//     directory, connects to each server's socket, takes over the descriptors it
//     holds (Adopt), and restarts what is gone.
//   - Both died: the next supervisor starts servers and recovers devices from state.
//
// # State
//
// A directory on tmpfs (it must not survive a reboot): one JSON file per attachment,
// written and renamed before an attach returns, removed after a detach; per
// attachment a directory with its server's socket and log.
//
// # API (version 1), over HTTP on a unix socket of mode 0600
//
//	POST   /v1/attachments               AttachRequest → Attachment   idempotent by ID
//	GET    /v1/attachments               → []Attachment
//	GET    /v1/attachments/{id}          → Attachment
//	POST   /v1/attachments/{id}/resize   → Attachment   takes the server's current size
//	DELETE /v1/attachments/{id}[?force=true]
//	GET    /v1/status                    → Status: version, transports and why one can't
//	POST   /v1/stop                      stops a supervisor that has no attachments
//
// {id} is path-escaped. An error is {"error": sentence, "kind": name of block's
// sentinel}, and Client turns it back into that sentinel.
//
// # Server protocol (version 1), SOCK_SEQPACKET unix socket, JSON messages, descriptors by SCM_RIGHTS
//
//	hello            → Hello: protocol, pid, device info
//	serve PROTOCOL   + descriptors; serve them from now on, beside what is served already
//	files            → the descriptors being served, and their protocol
//	stats            → counters
//	stop             stop taking requests, flush, close the image, answer, exit
package supervisor
