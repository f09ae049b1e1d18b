package attachtest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// serveNBD is the least of an NBD server: the transmission phase with simple replies,
// a goroutine per request. It returns when every connection has ended.
func serveNBD(files []*os.File, dev block.Device) error {
	errs := make([]error, len(files))
	var wg sync.WaitGroup
	for i, f := range files {
		wg.Go(func() { errs[i] = serveNBDConn(f, dev) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

const (
	nbdRequestMagic = 0x25609513
	nbdReplyMagic   = 0x67446698
	nbdFlagFUA      = 1 << 0
)

type nbdRequest struct {
	Magic        uint32
	Flags, Type  uint16
	Cookie, From uint64
	Len          uint32
}

func serveNBDConn(conn *os.File, dev block.Device) error {
	in := bufio.NewReaderSize(conn, 1<<16)
	var sending sync.Mutex
	var running sync.WaitGroup
	defer running.Wait()
	for {
		var r nbdRequest
		if err := binary.Read(in, binary.BigEndian, &r); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if r.Magic != nbdRequestMagic || r.Type <= 1 && r.Len > 32<<20 {
			return fmt.Errorf("not an NBD request: %+v", r)
		}
		var data []byte
		if r.Type <= 1 {
			data = make([]byte, r.Len)
		}
		if r.Type == 1 {
			if _, err := io.ReadFull(in, data); err != nil {
				return err
			}
		}
		if r.Type == 2 {
			return nil
		}
		running.Go(func() {
			err := doNBD(dev, r, data)
			reply := binary.BigEndian.AppendUint32(nil, nbdReplyMagic)
			reply = binary.BigEndian.AppendUint32(reply, uint32(block.Errno(err)))
			reply = binary.BigEndian.AppendUint64(reply, r.Cookie)
			if r.Type == 0 && err == nil {
				reply = append(reply, data...)
			}
			sending.Lock()
			defer sending.Unlock()
			_, _ = conn.Write(reply) // the reader sees the connection's end
		})
	}
}

func doNBD(dev block.Device, r nbdRequest, data []byte) error {
	off, n := int64(r.From), int64(r.Len)
	var err error
	switch r.Type {
	case 0:
		_, err = dev.ReadAt(data, off)
	case 1:
		_, err = dev.WriteAt(data, off)
	case 3:
		err = dev.Flush()
	case 4:
		err = dev.Discard(off, n)
	case 6:
		err = dev.WriteZeroes(off, n, 0)
	default:
		err = block.ErrInvalid
	}
	if err == nil && r.Flags&nbdFlagFUA != 0 {
		err = dev.Flush()
	}
	return err
}
