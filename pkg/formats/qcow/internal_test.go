package qcow

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

func TestNextTime(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for _, c := range []struct{ old, want uint32 }{
		{0, 1_700_000_000},
		{1_600_000_000, 1_700_000_000},
		{1_700_000_000, 1_700_000_001},
		{4_000_000_000, 4_000_000_001},
		{1<<32 - 1, 1_700_000_000},
	} {
		if got := nextTime(c.old, now); got != c.want {
			t.Errorf("after %d comes %d, want %d", c.old, got, c.want)
		}
	}
}

func TestHeader_DecodesWhatItEncodes(t *testing.T) {
	h := header{
		backingFileOffset: 0x0102030405060708, backingFileSize: 0x11121314, mtime: 0x21222324, size: 0x3132333435363738,
		clusterBits: 12, l2Bits: 9, padding: 0x4142, cryptMethod: 1, l1TableOffset: 0x5152535455565758,
	}
	if got := decodeHeader(h.encode()); got != h {
		t.Errorf("%+v, want %+v", got, h)
	}
}

// TestScraps compares with a set of bytes.
func TestScraps(t *testing.T) {
	const cluster, clusters = 16, 20
	r := testenv.Rand(t)
	var s scraps
	free := make([]bool, cluster*clusters) // of what is in s
	taken := make([]bool, len(free))       // what can be added
	for i := range taken {
		taken[i] = true
	}
	for range 20000 {
		if r.IntN(3) == 0 {
			n := int64(1 + r.IntN(cluster-1))
			if got, ok := s.take(n); ok {
				for i := got.start; i < got.end; i++ {
					if !free[i] || got.end-got.start != n {
						t.Fatalf("took %v, which was not free or is not %d long", got, n)
					}
					free[i], taken[i] = false, true
				}
			}
			continue
		}
		start := r.IntN(len(taken))
		end := start
		for end < len(taken) && taken[end] && end-start < r.IntN(40) {
			end++
		}
		if start == end {
			continue
		}
		for i := start; i < end; i++ {
			free[i], taken[i] = true, false
		}
		if whole, ok := s.add(span{int64(start), int64(end)}, cluster); ok {
			if whole.start%cluster != 0 || whole.end%cluster != 0 || whole.start >= whole.end {
				t.Fatalf("%v are not whole clusters", whole)
			}
			for i := whole.start; i < whole.end; i++ {
				if !free[i] {
					t.Fatalf("%v is not free at %d", whole, i)
				}
				free[i], taken[i] = false, true
			}
		}
		for i, f := range s.free {
			if f.start >= f.end || i > 0 && f.start <= s.free[i-1].end {
				t.Fatalf("pieces %v", s.free)
			}
		}
	}
	var kept int64
	for _, f := range s.free {
		kept += f.end - f.start
	}
	if n := len(slices.DeleteFunc(slices.Clone(free), func(f bool) bool { return !f })); int64(n) != kept {
		t.Errorf("%d bytes are kept, want %d", kept, n)
	}
}

func TestSorted(t *testing.T) {
	r := testenv.Rand(t)
	for _, count := range []int{0, 1, 100, 20000, 100000} {
		for _, most := range []int64{1, 100, 1 << 30, 1 << 54} {
			p := make([]int64, count)
			for i := range p {
				p[i] = r.Int64N(most) << 9
			}
			want := slices.Clone(p)
			slices.Sort(want)
			if !slices.Equal(sorted(p), want) {
				t.Errorf("%d offsets up to %d sectors are not in order", count, most)
			}
		}
	}
}

func TestBitmap_EachClear(t *testing.T) {
	r := testenv.Rand(t)
	for range 300 {
		units := int64(1 + r.IntN(400))
		b := newBitmap(units)
		want := make([]bool, units)
		for range r.IntN(12) {
			start := r.Int64N(units)
			s := span{start << 9, (start + 1 + r.Int64N(150)) << 9}
			b.fill(s, 9)
			for u := start; u < min(s.end>>9, units); u++ {
				want[u] = true
			}
		}
		got := slices.Repeat([]bool{true}, int(units))
		b.eachClear(func(first, end int64) {
			for u := first; u < end; u++ {
				got[u] = false
			}
		})
		if !slices.Equal(got, want) {
			t.Fatalf("%d units: %v, want %v", units, got, want)
		}
	}
}

// TestStoredList goes through more keys than it may hold, in passes.
func TestStoredList_Passes(t *testing.T) {
	r := testenv.Rand(t)
	for _, most := range []uint64{1, 5, 1000, 1 << 60} {
		keys := make([]uint64, 1000)
		for i := range keys {
			keys[i] = 1 + r.Uint64N(most)
		}
		s := storedList{limit: 20}
		var got []uint64
		for passes := 1; ; passes++ {
			for _, key := range keys {
				s.add(key)
			}
			if len(s.keys) > s.limit {
				t.Fatalf("%d keys at once, want at most %d", len(s.keys), s.limit)
			}
			slices.Sort(s.keys)
			got = append(got, slices.Compact(s.keys)...)
			if s.before == 0 {
				break
			}
			if passes > 1000 {
				t.Fatal("no end")
			}
			s.keys, s.from, s.before = s.keys[:0], s.before, 0
		}
		slices.Sort(keys)
		if !slices.Equal(got, slices.Compact(keys)) {
			t.Fatalf("keys up to %d: %d different ones came out", most, len(got))
		}
	}
}

// TestDeflate_Window: what repeats further back than readers remember is no repetition.
func TestDeflate_Window(t *testing.T) {
	noise := func(seed uint64) []byte {
		r := rand.New(rand.NewPCG(seed, 1))
		p := make([]byte, windowBytes)
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		return p
	}
	length := func(p []byte) int {
		d := deflaters.Get().(*deflater)
		defer deflaters.Put(d)
		if err := d.deflate(p); err != nil {
			t.Fatal(err)
		}
		out := make([]byte, len(p))
		if err := inflaters.Get().(*inflater).inflate(out, d.out.Bytes(), int64(len(p))); err != nil || !bytes.Equal(out, p) {
			t.Errorf("it does not inflate to what was deflated: %v", err)
		}
		return d.out.Len()
	}
	if n := length(slices.Concat(noise(1), noise(2), noise(1))); n < 3*windowBytes {
		t.Errorf("%d bytes: something refers %d bytes back", n, 2*windowBytes)
	}
	near := noise(1)[:1000]
	if n := length(slices.Repeat(near, 4)); n > 1500 {
		t.Errorf("%d bytes, want little more than %d", n, len(near))
	}
}
