// Package aescbc is the encryption of QCOW images, and of QCOW2 images with crypt_method 1:
// AES-128 in CBC mode, each 512-byte sector on its own, with the sector's number in the
// guest as initialisation vector. It hides contents from who knows nothing of them, and no
// more: the vectors are predictable, changes go unnoticed, and passwords are not stretched.
package aescbc

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"sync"
)

const (
	// KeyBytes is how much of a password counts.
	KeyBytes = 16

	sectorBytes = 512
)

// Cipher encrypts and decrypts whole sectors in place. It is safe for concurrent use.
type Cipher struct {
	encrypters, decrypters sync.Pool // of mode: making one allocates
}

// mode is a CBC mode that can be begun anew.
type mode interface {
	cipher.BlockMode
	SetIV(iv []byte)
}

// New returns the cipher of a password: its first 16 bytes, continued with zeroes if there
// are fewer. password is not kept.
func New(password []byte) *Cipher {
	key := make([]byte, KeyBytes)
	copy(key, password)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the only reason is a key of another length
	}
	iv := make([]byte, aes.BlockSize)
	return &Cipher{
		encrypters: sync.Pool{New: func() any { return &worker{mode: cipher.NewCBCEncrypter(block, iv).(mode)} }},
		decrypters: sync.Pool{New: func() any { return &worker{mode: cipher.NewCBCDecrypter(block, iv).(mode)} }},
	}
}

type worker struct {
	mode mode
	iv   [aes.BlockSize]byte
}

// Encrypt encrypts the sectors p, the first of which is at guestOff in the guest. Both are
// multiples of 512.
func (c *Cipher) Encrypt(p []byte, guestOff int64) {
	w := c.encrypters.Get().(*worker)
	w.crypt(p, guestOff)
	c.encrypters.Put(w)
}

// Decrypt is the inverse of Encrypt.
func (c *Cipher) Decrypt(p []byte, guestOff int64) {
	w := c.decrypters.Get().(*worker)
	w.crypt(p, guestOff)
	c.decrypters.Put(w)
}

func (w *worker) crypt(p []byte, guestOff int64) {
	number := uint64(guestOff) / sectorBytes
	for ; len(p) > 0; p = p[sectorBytes:] {
		binary.LittleEndian.PutUint64(w.iv[:], number)
		w.mode.SetIV(w.iv[:])
		w.mode.CryptBlocks(p[:sectorBytes], p[:sectorBytes])
		number++
	}
}
