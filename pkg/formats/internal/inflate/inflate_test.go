package inflate_test

import (
	"bytes"
	"compress/flate"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/internal/inflate"
)

// sample returns n bytes that a compressor finds something in.
func sample(r *rand.Rand, n int) []byte {
	p := make([]byte, 0, n)
	for len(p) < n {
		switch r.IntN(4) {
		case 0: // noise
			for range r.IntN(300) {
				p = append(p, byte(r.Uint32()))
			}
		case 1: // a run, or a short pattern
			period := 1 + r.IntN(12)
			for i := range r.IntN(3000) {
				p = append(p, byte(i%period))
			}
		case 2: // something from before
			if len(p) > 0 {
				from := r.IntN(len(p))
				p = append(p, p[from:min(len(p), from+r.IntN(600))]...)
			}
		case 3: // skewed bytes: long and short codes
			for range r.IntN(2000) {
				p = append(p, byte(r.ExpFloat64()*float64(1+r.IntN(20))))
			}
		}
	}
	return p[:n]
}

func deflate(t testing.TB, p []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err == nil {
		_, err = w.Write(p)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRaw(t *testing.T) {
	r := testenv.Rand(t)
	for range 300 {
		want := sample(r, r.IntN(200<<10))
		level := []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9}[r.IntN(5)]
		packed := deflate(t, want, level)
		tail := r.IntN(20) // what follows in the file
		got := make([]byte, len(want))
		n, taken, err := inflate.Raw(got, append(packed[:len(packed):len(packed)], make([]byte, tail)...))
		if err != nil || n != len(want) || taken != len(packed) || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, level %d: %d bytes from %d of %d, equal %v: %v",
				len(want), level, n, taken, len(packed), bytes.Equal(got, want), err)
		}
	}
}

// What is longer than expected, cut off or changed is an error, or still a stream; never
// anything else.
func TestRaw_Damaged(t *testing.T) {
	r := testenv.Rand(t)
	for range 300 {
		want := sample(r, 1+r.IntN(20<<10))
		packed := deflate(t, want, 6)
		got := make([]byte, len(want))
		short := r.IntN(len(want))
		if n, _, err := inflate.Raw(got[:short], packed); !errors.Is(err, inflate.ErrLonger) || n != short || !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("%d of %d bytes expected: %d, %v", short, len(want), n, err)
		}
		cut := r.IntN(len(packed))
		if n, _, err := inflate.Raw(got, packed[:cut]); !errors.Is(err, inflate.ErrCut) || !bytes.Equal(got[:n], want[:n]) {
			t.Fatalf("%d of %d bytes there: %d, %v", cut, len(packed), n, err)
		}
		damaged := bytes.Clone(packed)
		for range 1 + r.IntN(4) {
			damaged[r.IntN(len(damaged))] ^= 1 << r.IntN(8)
		}
		agree(t, damaged, 64<<10)
	}
}

// agree compares with the standard library, whatever the input.
func agree(t *testing.T, packed []byte, limit int) {
	t.Helper()
	reader := flate.NewReader(bytes.NewReader(packed))
	want, wantErr := io.ReadAll(io.LimitReader(reader, int64(limit)+1))
	got := make([]byte, limit)
	n, _, err := inflate.Raw(got, packed)
	if len(want) > limit {
		if !errors.Is(err, inflate.ErrLonger) || !bytes.Equal(got, want[:limit]) {
			t.Fatalf("more than %d bytes: %d, %v\n%x", limit, n, err, packed)
		}
		return
	}
	if (err == nil) != (wantErr == nil) && !errors.Is(err, inflate.ErrLonger) {
		t.Fatalf("%v, want %v\n%x", err, wantErr, packed)
	}
	if err == nil && !bytes.Equal(got[:n], want) {
		t.Fatalf("%d bytes are other than the standard library's %d\n%x", n, len(want), packed)
	}
}

func TestZlib(t *testing.T) {
	want := bytes.Repeat([]byte("granule "), 8<<10)
	var b bytes.Buffer
	w := zlib.NewWriter(&b)
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	packed := b.Bytes()
	got := make([]byte, len(want))
	if n, err := inflate.Zlib(got, packed); err != nil || n != len(want) || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes: %v", n, err)
	}
	for name, c := range map[string]struct {
		change func(p []byte) []byte
		want   error
	}{
		"nothing":    {func(p []byte) []byte { return nil }, inflate.ErrCut},
		"no trailer": {func(p []byte) []byte { return p[:len(p)-4] }, inflate.ErrCut},
		"checksum":   {func(p []byte) []byte { p[len(p)-1] ^= 1; return p }, inflate.ErrCorrupt},
		"method":     {func(p []byte) []byte { p[0] ^= 1; return p }, inflate.ErrCorrupt},
		"check bits": {func(p []byte) []byte { p[1] ^= 1; return p }, inflate.ErrCorrupt},
		"dictionary": {func(p []byte) []byte { p[1] = 0x20 + 31 - byte((uint(p[0])<<8+0x20)%31); return p }, inflate.ErrCorrupt},
		"block type": {func(p []byte) []byte { p[2] |= 6; return p }, inflate.ErrCorrupt},
	} {
		if _, err := inflate.Zlib(got, c.change(bytes.Clone(packed))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func FuzzRaw(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, level := range []int{flate.HuffmanOnly, 0, 1, 6} {
		f.Add(deflate(f, sample(r, 3000), level))
	}
	f.Fuzz(func(t *testing.T, packed []byte) { agree(t, packed, 4<<10) })
}

func BenchmarkRaw(b *testing.B) {
	for _, level := range []int{1, 6} {
		want := sample(rand.New(rand.NewPCG(3, 4)), 64<<10)
		packed := deflate(b, want, level)
		b.Run(fmt.Sprintf("level %d", level), func(b *testing.B) {
			b.SetBytes(int64(len(want)))
			for b.Loop() {
				if _, _, err := inflate.Raw(want, packed); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
