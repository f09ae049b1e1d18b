package formattest

import (
	"bytes"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Fuzz is the body of a format's fuzz target for images as a whole:
//
//	func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()...) }
//
// It damages images of the factories' kinds, and opens, checks, reads, writes and repairs
// them. Whatever they say: nothing panics, time and memory stay bounded (hostileTime,
// hostileBytes), no file stays open, and in an image that a check finds sound, what was
// written is read back.
func Fuzz(f *testing.F, factories ...Factory) {
	var images []*hostile
	for i, factory := range factories {
		factory.register()
		// Always the same: what a fuzzer learns about an input must stay true.
		r := rand.New(rand.NewPCG(uint64(i), 1))
		mem := vfs.NewMem()
		image := madeForDamage(f, factory, mem, r)
		intact, err := readFiles(mem)
		if err != nil {
			f.Fatal(err)
		}
		h := &hostile{f: factory, r: r, intact: intact, names: image.names, top: image.top()}
		h.findMetadata()
		images = append(images, h)
		h.seed(f, byte(i))
	}
	defer WriteFigures(f)
	f.Fuzz(func(t *testing.T, kind byte, seed uint64, patches []byte) {
		h := *images[int(kind)%len(images)]
		h.r = rand.New(rand.NewPCG(seed, 2))
		if err := h.use(h.patched(patches)); err != nil {
			t.Fatal(err)
		}
		h.f.figures(1).FuzzInputs.Add(1)
	})
}

// A patch of a fuzz input: which file, what to do, where, and with what.
//
//	file[1] action[1] offset[4] value[8]
const (
	patchBytes = 14
	maxPatches = 32
)

// The actions of patches: how many bytes of the value are put there, or that the file ends
// there. With patchReseal added, checksums are put right afterwards.
const (
	patchOne = iota
	patchTwo
	patchFour
	patchEight
	patchCut
	patchActions
	patchReseal = 0x80
)

// patched returns the image's files with patches applied.
func (h *hostile) patched(patches []byte) map[string][]byte {
	files := maps.Clone(h.intact)
	names := h.fileNames()
	reseal := map[string]bool{}
	for range maxPatches {
		if len(patches) < patchBytes {
			break
		}
		name, action := names[int(patches[0])%len(names)], patches[1]
		b := bytes.Clone(files[name])
		if len(b) > 0 {
			off := int(binary.LittleEndian.Uint32(patches[2:])) % len(b)
			switch a := action &^ patchReseal % patchActions; a {
			case patchCut:
				b = b[:off]
			default:
				copy(b[off:], patches[6:6+1<<a])
			}
		}
		files[name] = b
		reseal[name] = reseal[name] || action&patchReseal != 0
		patches = patches[patchBytes:]
	}
	if h.f.Reseal != nil {
		for name := range reseal {
			h.f.Reseal(name, files[name])
		}
	}
	return files
}

// fileNames returns the names of all files of the image, in an order that stays.
func (h *hostile) fileNames() []string { return slices.Sorted(maps.Keys(h.intact)) }

// seed gives the fuzzer something to begin with: no damage, and some in the places where
// the format's own data is.
func (h *hostile) seed(f *testing.F, kind byte) {
	const seeds = 40
	f.Add(kind, uint64(kind), []byte{})
	names := h.fileNames()
	extremes := []uint64{0, 1, 1 << 31, 1<<32 - 1, 1 << 40, 1 << 62, 1<<63 - 1, 1<<64 - 1}
	for i := range seeds {
		if len(h.metadata) == 0 {
			return
		}
		place := h.pickPlace()
		value := extremes[h.r.IntN(len(extremes))]
		patch := []byte{0, byte(h.r.IntN(patchActions)) | byte(h.r.IntN(2)*patchReseal)}
		for n, name := range names {
			if name == place.file {
				patch[0] = byte(n)
			}
		}
		patch = binary.LittleEndian.AppendUint32(patch, uint32(place.off))
		if h.r.IntN(2) == 0 {
			patch = binary.LittleEndian.AppendUint64(patch, value)
		} else {
			patch = binary.BigEndian.AppendUint64(patch, value)
		}
		f.Add(kind, uint64(i), patch)
	}
}
