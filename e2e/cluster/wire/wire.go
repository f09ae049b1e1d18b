// Package wire is what a cluster and the agents on its machines say to each other over virtual
// serial ports.
//
// A serial port has no connections: what one program left unread reaches the next. So messages
// are lines of JSON, each with the identity of the command that it belongs to; a line that
// is no message, or is of another command, is skipped. Who begins sends an empty line, which
// ends what a killed program may have left half-written.
//
// Each port carries one command at a time. A message with Run begins it, and ends one before it
// that may still run; then come In, and CloseIn once. The agent answers with any number of Out
// and Err, and Exit once. When nobody is connected to the port any more, the agent kills what
// it runs there.
package wire

// Ports is how many a machine has: how many commands can run at once.
const Ports = 8

// PortPrefix begins the names of ports; a number below Ports follows.
const PortPrefix = "imgdisk-agent-"

// ChunkBytes is how much a message carries at most.
const ChunkBytes = 48 << 10

// Message is one of either direction. Fields that are not named for it are empty.
type Message struct {
	Command string `json:"command"`           // identity
	Run     string `json:"run,omitempty"`     // what bash is to run
	In      []byte `json:"in,omitempty"`      // for its standard input
	CloseIn bool   `json:"closeIn,omitempty"` // the input is at its end
	Out     []byte `json:"out,omitempty"`     // from its standard output
	Err     []byte `json:"err,omitempty"`     // from its standard error
	Exit    *int   `json:"exit,omitempty"`    // it has ended, with this code; -1: by a signal, or it could not begin
}
