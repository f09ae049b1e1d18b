package formattest

import (
	"context"
	"fmt"
	"reflect"
	"runtime"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	// largeClusters and largeBytes bound the guest size of the image that testMemory opens:
	// some formats have to look through their tables when they are opened.
	largeClusters = 1 << 21
	largeBytes    = 1 << 40
	// storeBytes is what its files may take.
	storeBytes = 512 << 20
	// largeFiles is how many files it may have.
	largeFiles = 16
	// openBytes is how much memory an open image may take beside the table cache,
	// however large it is: the top-level table of QCOW2 may have half of that.
	openBytes = 64 << 20
	// openCache is the table cache's limit.
	openCache = 1 << 20
)

// testMemory opens a large image and uses it in many places: memory stays bounded.
func testMemory(t *testing.T, f Factory) {
	if !thin(f) || f.Base != nil || wraps(f.Format) {
		t.Skip("only for thin images that stand on nothing, of a format as it is")
	}
	r := testenv.Rand(t)
	mem := vfs.NewMem()
	mem.SetCapacity(storeBytes)
	size, err := makeLargest(f, mem)
	if err != nil {
		t.Skip(err)
	}
	before := liveBytes()
	opts := f.openOptions(f.fileName(0), vfs.ReadWrite, nil)
	opts.TableCacheBytes = openCache
	img, err := formats.Open(context.Background(), mem, f.fileName(0), opts)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 512)
	for range f.scaled(500) {
		off := r.Int64N(size/512) * 512
		if _, err := img.ReadAt(p, off); err != nil {
			t.Fatalf("read at %#x: %v", off, err)
		}
		if _, err := img.Map(off, min(size-off, 16<<20)); err != nil {
			t.Fatalf("map at %#x: %v", off, err)
		}
	}
	used := liveBytes() - before
	t.Logf("%d MiB open take %d KiB", size>>20, used>>10)
	if used > openBytes {
		t.Errorf("an image of %d bytes takes %d bytes of memory when it is open, want at most %d", size, used, openBytes)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
}

// wraps reports whether a format is another one, embedded, that a test has changed: what
// it is about is small, and need not work for what is large.
func wraps(f formats.Format) bool {
	t := reflect.TypeOf(f)
	if t.Kind() != reflect.Struct {
		return false
	}
	for _, field := range reflect.VisibleFields(t) {
		if field.Anonymous && field.Type.Implements(reflect.TypeFor[formats.Format]()) {
			return true
		}
	}
	return false
}

// makeLargest makes an image as large as the kind can be, up to largeBytes, and returns
// its guest size.
func makeLargest(f Factory, mem *vfs.Mem) (int64, error) {
	var err error
	o := f.Format.Options()
	quantum := max(o.SizeMultiple, 1)
	size := min(largeBytes, largeClusters*f.shape().cluster)
	if o.MaxSizeBytes > 0 {
		size = min(size, o.MaxSizeBytes/quantum*quantum)
	}
	for ; size > f.shape().size; size = size / 2 / quantum * quantum {
		files := 0
		fsys := vfs.Inject(mem, vfs.If(vfs.OfKind(vfs.OpCreate), func(vfs.Op) error {
			if files++; files > largeFiles {
				return fmt.Errorf("more than %d files: %w", largeFiles, block.ErrNoSpace)
			}
			return nil
		}))
		if _, err = newRig(f, fsys, size); err == nil {
			return size, nil
		}
	}
	return 0, fmt.Errorf("create a large image: %w", err)
}

// liveBytes returns how much memory is in use.
func liveBytes() int64 {
	var m runtime.MemStats
	for range 2 { // finalizers' memory goes with the second
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
