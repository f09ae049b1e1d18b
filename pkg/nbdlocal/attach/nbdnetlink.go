package attach

import (
	"errors"
	"fmt"
	"os"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
)

// The generic netlink interface of the kernel's nbd driver
// (include/uapi/linux/nbd-netlink.h, nbd.h), version 1.

const (
	nbdFamily  = "nbd"
	nbdVersion = 1
)

// Commands.
const (
	nbdConnect     = 1
	nbdDisconnect  = 2
	nbdReconfigure = 3
)

// Attributes of a command.
const (
	nbdIndex           = 1  // u32
	nbdSizeBytes       = 2  // u64
	nbdBlockSizeBytes  = 3  // u64
	nbdTimeout         = 4  // u64, seconds; 0 = requests may take any time
	nbdServerFlags     = 5  // u64
	nbdClientFlags     = 6  // u64
	nbdSockets         = 7  // nested: nbdSockItem...
	nbdDeadConnTimeout = 8  // u64, seconds
	nbdBackend         = 10 // string
	nbdSockItem        = 1  // nested: nbdSockFD
	nbdSockFD          = 1  // u32
)

// Server flags: NBD's transmission flags.
const (
	nbdHasFlags    = 1 << 0
	nbdReadOnly    = 1 << 1
	nbdSendFlush   = 1 << 2
	nbdSendFUA     = 1 << 3
	nbdSendTrim    = 1 << 5
	nbdSendZeroes  = 1 << 6
	nbdMultiConn   = 1 << 8
	nbdDestroyOnce = 1 << 0 // client flag: remove the device when it is disconnected
)

// errNoNBD says that the kernel's nbd driver can't be reached at all.
var errNoNBD = errors.New("no generic netlink family of its name")

// nbdReachable says whether the driver can be told anything by this process.
func nbdReachable() error {
	if err := checkAdmin(); err != nil {
		return err
	}
	return withNBD(func(*genetlink.Conn, genetlink.Family) error { return nil })
}

func withNBD(f func(*genetlink.Conn, genetlink.Family) error) error {
	conn, err := genetlink.Dial(nil)
	if err != nil {
		return fmt.Errorf("generic netlink: %w", err)
	}
	defer func() { _ = conn.Close() }()
	family, err := conn.GetFamily(nbdFamily)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", nbdFamily, errNoNBD)
	}
	if err != nil {
		return fmt.Errorf("generic netlink family %s: %w", nbdFamily, err)
	}
	return f(conn, family)
}

// nbdCommand has the kernel carry out a command. The error holds the kernel's error
// number, or errNoNBD.
func nbdCommand(command uint8, attributes func(*netlink.AttributeEncoder)) error {
	encoder := netlink.NewAttributeEncoder()
	attributes(encoder)
	data, err := encoder.Encode()
	if err != nil {
		return fmt.Errorf("nbd command %d: %w", command, err)
	}
	message := genetlink.Message{Header: genetlink.Header{Command: command, Version: nbdVersion}, Data: data}
	// A connection for each: CONNECT is answered and acknowledged, and the
	// acknowledgement that nobody reads would be taken for the next command's.
	return withNBD(func(conn *genetlink.Conn, family genetlink.Family) error {
		if _, err := conn.Execute(message, family.ID, netlink.Request|netlink.Acknowledge); err != nil {
			return fmt.Errorf("nbd command %d: %w", command, err)
		}
		return nil
	})
}

// putSockets adds the kernel's ends of the connections.
func putSockets(encoder *netlink.AttributeEncoder, pairs []socketPair) {
	encoder.Nested(nbdSockets, func(list *netlink.AttributeEncoder) error {
		for _, p := range pairs {
			list.Nested(nbdSockItem, func(item *netlink.AttributeEncoder) error {
				item.Uint32(nbdSockFD, uint32(p.kernel))
				return nil
			})
		}
		return nil
	})
}
