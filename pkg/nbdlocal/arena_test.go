package nbdlocal

import (
	"testing"
	"unsafe"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

func TestArena_Random(t *testing.T) {
	rnd := testenv.Rand(t)
	a, err := newArena(MinBufferBytes + 7*granuleBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer a.free()
	type piece struct{ first, n int }
	var taken []piece
	owner := make([]int, a.count)
	refused := 0
	for id := 1; id < 20_000; id++ {
		if len(taken) > 0 && rnd.IntN(2) == 0 {
			i := rnd.IntN(len(taken))
			p := taken[i]
			taken = append(taken[:i], taken[i+1:]...)
			a.give(p.first, p.n)
			for g := p.first; g*granuleBytes < p.first*granuleBytes+p.n; g++ {
				owner[g] = 0
			}
			continue
		}
		n := 1 + rnd.IntN(8*granuleBytes)
		if rnd.IntN(10) == 0 {
			n = 1 + rnd.IntN(maxPayloadBytes)
		}
		buf, first := a.take(n)
		if buf == nil {
			refused++
			if free := longestFree(owner); free*granuleBytes >= n {
				t.Fatalf("%d bytes refused although %d granules in a row are free", n, free)
			}
			continue
		}
		if len(buf) != n || uintptr(unsafe.Pointer(&buf[0]))%4096 != 0 {
			t.Fatalf("buffer of %d bytes at %p, want %d at a page's start", len(buf), buf, n)
		}
		for g := first; g*granuleBytes < first*granuleBytes+n; g++ {
			if owner[g] != 0 {
				t.Fatalf("granule %d given out twice", g)
			}
			owner[g] = id
		}
		taken = append(taken, piece{first, n})
	}
	if refused == 0 {
		t.Error("the arena was never full")
	}
	for _, p := range taken {
		a.give(p.first, p.n)
	}
	if buf, _ := a.take(maxPayloadBytes); a.used*granuleBytes != maxPayloadBytes || buf == nil {
		t.Errorf("after all was given back, %d granules are in use", a.used)
	}
}

func longestFree(owner []int) int {
	longest, run := 0, 0
	for _, o := range owner {
		if run++; o != 0 {
			run = 0
		}
		longest = max(longest, run)
	}
	return longest
}

func TestArena_TwiceGiven(t *testing.T) {
	a, err := newArena(MinBufferBytes)
	if err != nil {
		t.Fatal(err)
	}
	defer a.free()
	_, first := a.take(5)
	a.give(first, 5)
	defer func() {
		if recover() == nil {
			t.Error("a buffer given back twice went unnoticed")
		}
	}()
	a.give(first, 5)
}

func BenchmarkArena(b *testing.B) {
	a, err := newArena(64 << 20)
	if err != nil {
		b.Fatal(err)
	}
	defer a.free()
	for range 30 { // a queue of 1 MiB requests
		a.take(mib)
	}
	for b.Loop() {
		_, first := a.take(mib)
		a.give(first, mib)
	}
}
