package formattest

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

type opKind int

const (
	opRead opKind = iota
	opWrite
	opZero
	opDiscard
	opMap
	opFlush
	opReopen // close and open again
	opGrow   // to off bytes
	opPush   // an overlay becomes the top layer
	opShrink // to off bytes
	opPack   // the granule around off is written compressed
)

var opNames = [...]string{
	opRead: "read", opWrite: "write", opZero: "zero", opDiscard: "discard", opMap: "map",
	opFlush: "flush", opReopen: "reopen", opGrow: "grow", opPush: "push", opShrink: "shrink", opPack: "write compressed",
}

// op is one step of a script.
type op struct {
	kind   opKind
	off, n int64
	flags  block.ZeroFlags
}

// String shows the step as in "write 512 bytes at 0x1200".
func (o op) String() string {
	s := opNames[o.kind]
	switch o.kind {
	case opRead, opWrite, opZero, opDiscard, opMap, opPack:
		s += fmt.Sprintf(" %d bytes at %#x", o.n, o.off)
	case opGrow, opShrink:
		s += fmt.Sprintf(" to %d bytes", o.off)
	}
	if o.flags&block.ZeroKeepAllocated != 0 {
		s += " (keep allocated)"
	}
	if o.flags&block.ZeroFastOnly != 0 {
		s += " (fast only)"
	}
	return s
}

// mix says how often each kind of step occurs in a script, in relation to the others.
type mix map[opKind]int

// pick returns a kind. It goes through the kinds in order: the same seed gives the same
// script.
func (m mix) pick(r *rand.Rand) opKind {
	total := 0
	for _, weight := range m {
		total += weight
	}
	at := r.IntN(total)
	for kind := opRead; ; kind++ {
		if at -= m[kind]; at < 0 {
			return kind
		}
	}
}

// shape is what a script has to know about a disk.
type shape struct {
	size    int64
	cluster int64 // a guess for flat images
	granule int64 // what can be present alone: a cluster, or a part of one
	quantum int64 // sizes are multiples of it
	maxGrow int64 // the size beyond which it does not grow
}

// script returns count random steps for the factory's disks, of kinds that they can do.
func (f Factory) script(r *rand.Rand, m mix, count int) []op {
	m = maps.Clone(m)
	if f.CannotGrow {
		delete(m, opGrow)
	}
	if !f.CanShrink {
		delete(m, opShrink)
	}
	if f.Compressed {
		m[opPack] = (m[opWrite] + 2) / 3
	}
	if f.Overlay == nil {
		delete(m, opPush)
	}
	return newScript(r, f.shape(), m, count)
}

// newScript returns count random steps for a disk.
func newScript(r *rand.Rand, s shape, m mix, count int) []op {
	var script []op
	for len(script) < count {
		o := op{kind: m.pick(r)}
		switch o.kind {
		case opGrow:
			o.off = s.size + (1+r.Int64N(3*s.cluster/s.quantum))*s.quantum
			if o.off > s.maxGrow {
				continue
			}
			s.size = o.off
		case opShrink:
			o.off = s.pickSmaller(r)
			if o.off == s.size {
				continue
			}
			if r.IntN(2) == 0 { // as people do who know what is not in use
				script = append(script, op{kind: opDiscard, off: o.off, n: s.size - o.off})
			}
			s.size = o.off
		case opFlush, opReopen, opPush:
		default:
			o.off, o.n = s.pickRange(r)
		}
		if o.kind == opZero {
			o.flags = block.ZeroFlags(r.IntN(int(block.ZeroKeepAllocated | block.ZeroFastOnly + 1)))
		}
		script = append(script, o)
	}
	return script
}

// pickSmaller returns a smaller size, or the present one if the disk is small enough: in
// the middle of clusters and at their edges.
func (s shape) pickSmaller(r *rand.Rand) int64 {
	least := max(s.maxGrow/3, 4*s.quantum)
	size := s.size - 1 - r.Int64N(3*s.cluster)
	if r.IntN(3) == 0 {
		size = size / s.cluster * s.cluster
	}
	if size = size / s.quantum * s.quantum; size < least {
		return s.size
	}
	return size
}

// largeLen is the length of requests that are rare where clusters are larger.
const largeLen = 256 << 10

// pickRange returns a range of the disk: of all sizes and alignments, with a liking for
// the edges of clusters and the end of the disk.
func (s shape) pickRange(r *rand.Rand) (off, n int64) {
	n = s.pickLen(r)
	edge := s.cluster
	if r.IntN(2) == 0 {
		edge = s.granule
	}
	switch r.IntN(6) {
	case 0:
		off = r.Int64N(s.size)
	case 1:
		off = r.Int64N(s.size) / 512 * 512
	case 2: // whole clusters, or what can be present alone
		off = r.Int64N(s.size) / edge * edge
		n = (n + edge - 1) / edge * edge
	case 3: // over or close to an edge between them
		off = r.Int64N(s.size)/edge*edge - r.Int64N(n+1)
	case 4: // up to the end
		off = s.size - n
	case 5: // in the first clusters, so that things meet there
		off = r.Int64N(min(3*s.cluster, s.size)) / 512 * 512
	}
	off = min(max(off, 0), s.size)
	return off, min(n, s.size-off)
}

func (s shape) pickLen(r *rand.Rand) int64 {
	switch r.IntN(6) {
	case 0:
		return 1 + r.Int64N(16)
	case 1:
		return 512
	case 2:
		return 4096
	case 3:
		return 1 + r.Int64N(s.granule)
	case 4:
		return s.granule * (1 + r.Int64N(min(s.cluster/s.granule, 4)))
	}
	most := min(4*s.cluster, s.size)
	if most > largeLen && r.IntN(4) > 0 {
		most = largeLen // large requests take long, and a few of them do
	}
	return 1 + r.Int64N(most)
}

// show lists the steps up to and including last, at most a screenful of them.
func show(script []op, last int) string {
	const screenful = 25
	last = min(last, len(script)-1)
	var b strings.Builder
	from := max(last+1-screenful, 0)
	if from > 0 {
		fmt.Fprintf(&b, "  (%d steps before)\n", from)
	}
	for i := from; i <= last; i++ {
		fmt.Fprintf(&b, "  %4d %s\n", i, script[i])
	}
	return b.String()
}
