package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// client is the least of an NBD client (NBD protocol: "Fixed newstyle negotiation", and
// simple replies): enough to see that a server has opened its image and reads it.
type client struct {
	conn      net.Conn
	sizeBytes int64
}

const (
	nbdMagic        = "NBDMAGICIHAVEOPT"
	optExportName   = 1
	flagNoZeroes    = 1 << 1
	clientFlags     = 1 | flagNoZeroes // fixed newstyle, no zeroes
	requestMagic    = 0x25609513
	simpleReply     = 0x67446698
	handshakeZeroes = 124
	answerPatience  = 30 * time.Second
)

// dial connects to the server on a unix socket and asks for its default export.
func dial(socket string) (*client, error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return nil, err
	}
	c := &client{conn: conn}
	if err := c.handshake(); err != nil {
		return nil, errors.Join(fmt.Errorf("handshake: %w", err), conn.Close())
	}
	return c, nil
}

func (c *client) close() { c.conn.Close() }

func (c *client) handshake() error {
	if err := c.conn.SetDeadline(time.Now().Add(answerPatience)); err != nil {
		return err
	}
	greeting := make([]byte, len(nbdMagic)+2)
	if _, err := io.ReadFull(c.conn, greeting); err != nil {
		return err
	}
	if string(greeting[:len(nbdMagic)]) != nbdMagic {
		return fmt.Errorf("greeting %q: not an NBD server", greeting)
	}
	serverFlags := binary.BigEndian.Uint16(greeting[len(nbdMagic):])
	answer := binary.BigEndian.AppendUint32(nil, uint32(serverFlags)&clientFlags)
	answer = append(answer, nbdMagic[8:]...)
	answer = binary.BigEndian.AppendUint32(answer, optExportName)
	answer = binary.BigEndian.AppendUint32(answer, 0) // the default export has no name
	if _, err := c.conn.Write(answer); err != nil {
		return err
	}
	export := make([]byte, 8+2)
	if serverFlags&flagNoZeroes == 0 {
		export = make([]byte, 8+2+handshakeZeroes)
	}
	if _, err := io.ReadFull(c.conn, export); err != nil {
		return err
	}
	c.sizeBytes = int64(binary.BigEndian.Uint64(export))
	return nil
}

// read reads one piece of the disk.
func (c *client) read(p []byte, off int64) error {
	if err := c.conn.SetDeadline(time.Now().Add(answerPatience)); err != nil {
		return err
	}
	request := binary.BigEndian.AppendUint32(nil, requestMagic)
	request = binary.BigEndian.AppendUint32(request, 0) // no flags; command 0: read
	request = binary.BigEndian.AppendUint64(request, uint64(off))
	request = binary.BigEndian.AppendUint64(request, uint64(off))
	request = binary.BigEndian.AppendUint32(request, uint32(len(p)))
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(c.conn, reply); err != nil {
		return err
	}
	if magic := binary.BigEndian.Uint32(reply); magic != simpleReply {
		return fmt.Errorf("reply begins with %#x, want %#x", magic, simpleReply)
	}
	if code := binary.BigEndian.Uint32(reply[4:]); code != 0 {
		return fmt.Errorf("read of %d bytes at %d: NBD error %d", len(p), off, code)
	}
	_, err := io.ReadFull(c.conn, p)
	return err
}
