// Package supervisor keeps volumes attached: one server process per volume, started,
// watched and restarted, with the kernel transport of package attach in front.
//
// # Processes
//
//	node plugin ──(api.sock: HTTP+JSON, Client)──► supervisor ──(server.sock: Server protocol)──► server, one per volume
//	                                                   │  │                                           │
//	                                                   │  └── attach.Transport ── kernel ◄── descriptors ┘
//	                                                   └──(package keeper)──► keeper: holds fuse descriptors, too
//
// The supervisor has the privileges (netlink, mount, loop) and never opens an image;
// a server opens one image and has no privileges. Any of the processes may be killed
// at any time: applications see a pause, not an error.
//
//   - A server died: the supervisor waits until it is gone (pidfd, and the lock below),
//     starts a new one and lets the transport recover the device. Restarts back off up
//     to a few seconds and never stop: the reason is in the attachment's status.
//   - The supervisor died: servers go on serving. The next supervisor reads the state
//     directory, connects to each server's socket, takes over the descriptors it
//     holds (Adopt), and restarts what is gone.
//   - Both died: the next supervisor starts servers and recovers devices from state.
//     Devices wait for that. A fuse device does because the keeper holds its descriptor:
//     the kernel ends a FUSE connection with the last process that does.
//   - The keeper died: the supervisor starts another and gives it what it holds itself.
//   - All three died: a fuse device fails its users' requests; the attachment is Lost.
//   - Another node took the volume (a server's Opened.Lost, or block.ErrFenced when it
//     opens): the device is removed under its users, the attachment is Lost.
//
// # State
//
// A directory on tmpfs (it must not survive a reboot, and does not count if it does):
//
//	supervisor.lock              held by the supervisor, from before it starts until it ends
//	api.sock, supervisor.log     the API; the log of one that Ensure started
//	keeper/                      the keeper's socket, lock and log
//	attachments/HASH/            per attachment, named for a hash of its ID:
//	    record.json              the record: request, phase, seat, the transport's state
//	    server.lock              held by the server, see below
//	    server.sock              the server's control socket
//	    server.sock.exit         how the last server ended, if it could say
//	    server-1.*               the same for a server in the other seat
//	    server.log               what servers wrote
//
// A record is written and renamed before what it allows may happen, and removed when
// nothing is left.
//
// The server's lock is an open file description's: the supervisor takes it and the
// server it then starts inherits it and cannot help holding it until its last thread
// is gone. Whether a server exists is thus never guessed from a process id; a
// successor is not started, and the directory not removed, without the lock.
//
// # Repair
//
// A supervisor can be killed between any two steps. What its record's phase lets the
// next one find, and what that does:
//
//   - attaching: a directory; perhaps a server; perhaps, if the record has the
//     transport's state, kernel objects. No client has been told of a device, so
//     everything is undone; the client asks again.
//   - serving: a device; a server, unless it died too. Adopted; recovered if no server
//     is there, or one that holds fewer descriptors than the device has.
//   - recovering: a device; perhaps a dead server's successor, which may or may not have
//     descriptors yet, and for which the kernel may or may not have resent requests.
//     Adopted, the server killed, and recovered: carrying out a request twice at the
//     same time is the one thing that must not happen.
//   - detaching: a device, or none any more. With one the detach is void and it serves
//     again (the client asks again). Without one it is finished: the image closed, the
//     directory removed.
//   - lost: perhaps still a device and a server: removed and stopped.
//
// A detach leaves the image closed. If the server died before it could close it, another
// opens it, replays what the first left, and closes it; the file server.sock.exit tells.
//
// A server killed together with the supervisor may have been asked something by a thread
// of the supervisor's that nothing interrupts. What such threads must not hold, see
// attach.apart; and while a device is being made the keeper does not have it.
//
// Servers start in turns (turns.go): a busy processor that starts many together starts none
// in time.
//
// # Upgrades
//
// A server is replaced by one of another program with requests waiting for well under a
// second: upgrade.go says how. There are two seats for servers in an attachment's
// directory; the record says whose turn it is, and changes in one piece. Who is found in
// the other seat has opened nothing, and is killed. So a supervisor that is killed during
// an upgrade leaves "serving", when nothing has happened yet, or "recovering".
//
// A program is kept by its descriptor as long as its server serves: when another program's
// server does not come to serve, by an upgrade or after a crash, the two take turns.
//
// A supervisor is replaced by ending it (Client.Leave) and starting another: see Replace.
//
// # API (version 1), over HTTP on a unix socket of mode 0600
//
//	POST   /v1/attachments               AttachRequest → Attachment   idempotent by ID
//	GET    /v1/attachments               → []Attachment
//	GET    /v1/attachments/{id}          → Attachment
//	GET    /v1/attachments/{id}/stats    → ServerStats
//	POST   /v1/attachments/{id}/resize   → Attachment   takes the server's current size
//	POST   /v1/attachments/{id}/limits   LimitsRequest → Attachment
//	GET    /v1/attachments/{id}/debug    → DebugInfo of the server
//	POST   /v1/attachments/{id}/upgrade  UpgradeRequest → Attachment   another program serves
//	POST   /v1/upgrade                   UpgradeRequest → []UpgradeResult   all, one after another
//	DELETE /v1/attachments/{id}[?force=true]
//	GET    /v1/status                    → Status: version, transports and why one can't
//	POST   /v1/stop                      stops a supervisor that has no attachments, or,
//	                                     with {"keep":true}, leaves them to the next one
//
// {id} is path-escaped. An error is {"error": sentence, "kind": name of block's
// sentinel}, and Client turns it back into that sentinel. Requests for one attachment
// are carried out one after the other, except that a detach by force ends whatever is
// under way. What was begun is finished also when the client is gone.
//
// # Server protocol (version 1), SOCK_SEQPACKET unix socket, JSON messages, descriptors by SCM_RIGHTS
//
//	ready            → the program's version, without opening the device
//	hello            → Hello: protocol, pid, device info; opens the device, if it is not yet
//	serve PROTOCOL   + descriptors; serve them from now on, beside what is served already
//	files            → the descriptors being served, and their protocol
//	watch ENDED      → answers when not ENDED descriptors have ended in the server's life
//	stats            → counters
//	limits LIMITS    have these limits count instead of the volume's own; null: those again
//	debug            → stacks and memory
//	stop             stop taking requests, flush, close the image, answer, exit
//
// One message is one request or its answer; a connection's requests are answered in
// order.
//
// # Reading order
//
// api.go; server.go (a server's side: RunServer); process.go (the supervisor's side of a
// server); attachment.go and steps.go (an attachment's life); upgrade.go; kept.go (what the
// keeper has); supervisor.go, http.go;
// client.go, ensure.go, lock.go.
package supervisor
