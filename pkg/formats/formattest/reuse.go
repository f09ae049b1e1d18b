package formattest

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// testReuse writes and discards the same few clusters many times: what is freed is used
// again, so that the image stays small.
func testReuse(t *testing.T, f Factory) {
	const clusters = 4
	rounds := int64(max(100/max(f.Cost, 1), 20))
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	p := newPlayer(t, f, mem, r, 1)
	s := f.shape()
	initial := totalBytes(t, mem)
	for range rounds {
		area := op{off: r.Int64N(s.size/s.cluster-clusters+1) * s.cluster, n: clusters * s.cluster}
		for _, kind := range []opKind{opWrite, opDiscard, opFlush} {
			area.kind = kind
			p.mustStep(t, area)
		}
	}
	p.finish(t)
	total := totalBytes(t, mem)
	if most := initial + s.size + rounds/4*clusters*s.cluster; total > most {
		t.Errorf("after %d clusters were written and discarded, the image is %d bytes long, want at most %d", rounds*clusters, total, most)
	}
}

// totalBytes returns the length of all files.
func totalBytes(t *testing.T, fsys vfs.FS) (total int64) {
	t.Helper()
	files, err := readFiles(fsys)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range files {
		total += int64(len(b))
	}
	return total
}
