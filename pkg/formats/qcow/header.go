package qcow

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

const (
	magic       = 'Q'<<24 | 'F'<<16 | 'I'<<8 | 0xfb
	version     = 1
	headerBytes = 48

	minClusterBits, maxClusterBits = 9, 16
	minL2Bits, maxL2Bits           = 6, 13

	cryptNone = 0
	cryptAES  = 1

	// maxNameBytes is the longest name of a backing file that QEMU takes.
	maxNameBytes = 1023

	// maxL1Entries bounds the memory for the level 1 table, to 32 MiB, and as much again
	// for where its tables are. With 4 KiB clusters and tables, as QEMU makes them, an
	// image of 8 TiB needs as much.
	maxL1Entries = 4 << 20
)

// header is what the first 48 bytes of a file say, in the order in which they do. All
// numbers are big-endian.
type header struct {
	backingFileOffset uint64
	backingFileSize   uint32
	mtime             uint32 // when it was last opened and changed; QEMU ignores it
	size              uint64 // of the guest, in bytes
	clusterBits       uint8
	l2Bits            uint8
	padding           uint16
	cryptMethod       uint32
	l1TableOffset     uint64
}

func decodeHeader(p []byte) header {
	be := binary.BigEndian
	return header{
		backingFileOffset: be.Uint64(p[8:]),
		backingFileSize:   be.Uint32(p[16:]),
		mtime:             be.Uint32(p[20:]),
		size:              be.Uint64(p[24:]),
		clusterBits:       p[32],
		l2Bits:            p[33],
		padding:           be.Uint16(p[34:]),
		cryptMethod:       be.Uint32(p[36:]),
		l1TableOffset:     be.Uint64(p[40:]),
	}
}

func (h *header) encode() []byte {
	be := binary.BigEndian
	p := be.AppendUint32(make([]byte, 0, headerBytes), magic)
	p = be.AppendUint32(p, version)
	p = be.AppendUint64(p, h.backingFileOffset)
	p = be.AppendUint32(p, h.backingFileSize)
	p = be.AppendUint32(p, h.mtime)
	p = be.AppendUint64(p, h.size)
	p = append(p, h.clusterBits, h.l2Bits)
	p = be.AppendUint16(p, h.padding)
	p = be.AppendUint32(p, h.cryptMethod)
	return be.AppendUint64(p, h.l1TableOffset)
}

// validate returns what is wrong with the header of a file that is fileSize bytes long.
// Nothing else may be computed from it before.
func (h *header) validate(fileSize int64) error {
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return corrupt("cluster_bits is %d, want %d to %d", h.clusterBits, minClusterBits, maxClusterBits)
	}
	if h.l2Bits < minL2Bits || h.l2Bits > maxL2Bits {
		return corrupt("l2_bits is %d, want %d to %d", h.l2Bits, minL2Bits, maxL2Bits)
	}
	if h.cryptMethod != cryptNone && h.cryptMethod != cryptAES {
		return unsupported("crypt_method is %d, want %d (none) or %d (AES)", h.cryptMethod, cryptNone, cryptAES)
	}
	if h.size == 0 {
		return corrupt("size is 0, want at least 1")
	}
	if n := h.l1Entries(); n > maxL1Entries {
		return unsupported("size is %d, for which it takes %d level 1 entries with clusters and level 2 tables as they are, want at most %d",
			h.size, n, maxL1Entries)
	}
	if err := h.validateL1(uint64(fileSize)); err != nil {
		return err
	}
	return h.validateBacking(uint64(fileSize))
}

func (h *header) validateL1(fileSize uint64) error {
	length := h.l1Entries() * entryBytes
	if h.l1TableOffset < headerBytes || h.l1TableOffset%entryBytes != 0 {
		return corrupt("l1_table_offset is %#x, want a multiple of %d from %d on", h.l1TableOffset, entryBytes, headerBytes)
	}
	if h.l1TableOffset > fileSize || length > fileSize-h.l1TableOffset {
		return corrupt("the level 1 table of %d bytes at %#x lies outside the file of %d bytes", length, h.l1TableOffset, fileSize)
	}
	return nil
}

// validateBacking checks where the backing file's name is. QEMU puts it between the header
// and the level 1 table.
func (h *header) validateBacking(fileSize uint64) error {
	if !h.hasBacking() {
		return nil
	}
	at, n := h.backingFileOffset, uint64(h.backingFileSize)
	if n > maxNameBytes {
		return corrupt("backing_file_size is %d, want at most %d", n, maxNameBytes)
	}
	if at < headerBytes || at > fileSize || n > fileSize-at {
		return corrupt("the backing file's name of %d bytes at %#x lies in the header or outside the file of %d bytes", n, at, fileSize)
	}
	if at < h.l1TableOffset+h.l1Entries()*entryBytes && h.l1TableOffset < at+n {
		return corrupt("the backing file's name of %d bytes at %#x overlaps the level 1 table at %#x", n, at, h.l1TableOffset)
	}
	return nil
}

func (h *header) hasBacking() bool { return h.backingFileOffset != 0 && h.backingFileSize != 0 }

// l1Entries returns how many level 1 entries the size needs.
func (h *header) l1Entries() uint64 { return (h.size-1)>>(h.clusterBits+h.l2Bits) + 1 }

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrCorrupt}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrUnsupported}, args...)...)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{block.ErrInvalid}, args...)...)
}
