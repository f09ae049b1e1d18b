package aescbc

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"sync"
	"testing"
)

// The first block of a sector of zeroes is the encrypted initialisation vector: for sector
// 0 and a key of zeroes, the known answer of AES for a block of zeroes.
func TestEncrypt_KnownAnswer(t *testing.T) {
	p := make([]byte, sectorBytes)
	New(nil).Encrypt(p, 0)
	if got, want := hex.EncodeToString(p[:16]), "66e94bd4ef8a2c3b884cfa59ca342b2e"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestEncrypt_SectorNumberIsTheVector(t *testing.T) {
	const sector = 0x0123456789
	plain := bytes.Repeat([]byte("sixteen bytes it"), 2*sectorBytes/16)
	got := bytes.Clone(plain)
	c := New([]byte("password"))
	c.Encrypt(got, sector*sectorBytes)

	block, err := aes.NewCipher([]byte("password\x00\x00\x00\x00\x00\x00\x00\x00"))
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(plain)
	for i, number := range []byte{0x89, 0x8a} {
		iv := []byte{number, 0x67, 0x45, 0x23, 0x01, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
		part := want[i*sectorBytes : (i+1)*sectorBytes]
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(part, part)
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes than each sector by itself gives")
	}
	c.Decrypt(got, sector*sectorBytes)
	if !bytes.Equal(got, plain) {
		t.Error("decrypting does not give back what was encrypted")
	}
}

func TestNew_LongPasswordsAreCutOff(t *testing.T) {
	a, b := make([]byte, sectorBytes), make([]byte, sectorBytes)
	New([]byte("0123456789abcdef")).Encrypt(a, 0)
	New([]byte("0123456789abcdefghij")).Encrypt(b, 0)
	if !bytes.Equal(a, b) {
		t.Error("more than 16 bytes count")
	}
}

func TestCipher_Concurrent(t *testing.T) {
	c := New([]byte("key"))
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for round := range 200 {
				plain := bytes.Repeat([]byte{byte(i), byte(round)}, sectorBytes)
				p := bytes.Clone(plain)
				off := int64(i*1000+round) * sectorBytes
				c.Encrypt(p, off)
				if bytes.Equal(p, plain) {
					t.Error("not encrypted")
				}
				c.Decrypt(p, off)
				if !bytes.Equal(p, plain) {
					t.Error("decrypting does not give back what was encrypted")
				}
			}
		})
	}
	all.Wait()
}

func BenchmarkEncrypt(b *testing.B) { benchmark(b, (*Cipher).Encrypt) }
func BenchmarkDecrypt(b *testing.B) { benchmark(b, (*Cipher).Decrypt) }

func benchmark(b *testing.B, do func(*Cipher, []byte, int64)) {
	c, p := New([]byte("key")), make([]byte, 64<<10)
	b.SetBytes(int64(len(p)))
	for b.Loop() {
		do(c, p, 0)
	}
}
