package formattest_test

import (
	"os"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
)

// toyFactory describes images of a format without bugs, or with the one that
// TestSuite_FindsBugs asks for.
func toyFactory() formattest.Factory {
	return formattest.Factory{
		Name: "toy", Format: toy{bug: toyBug(os.Getenv(bugVariable))}, Overlay: new(formats.CreateRequest), SizeBytes: 160<<10 + 512,
		CanShrink: true, Compressed: true, CanRebase: true,
	}
}

// factories are the toy in all its forms.
func factories() []formattest.Factory {
	bug := toyBug(os.Getenv(bugVariable))
	encrypted := toyFactory()
	encrypted.Name, encrypted.Format, encrypted.Compressed = "encrypted", toy{bug: bug, encrypted: true, password: "open sesame"}, false
	encrypted.Secret = func(string) ([]byte, error) { return []byte("open sesame"), nil }
	onRaw, onSmaller, onLarger := toyFactory(), toyFactory(), toyFactory()
	onRaw.Name, onRaw.Base = "on raw", &formattest.Base{Format: raw.Format{}, QEMU: "raw"}
	for _, f := range []*formattest.Factory{&onRaw, &onSmaller, &onLarger} {
		f.Cost = 3 // what they are about is found soon
	}
	onSmaller.Name, onSmaller.Base = "on smaller", &formattest.Base{Format: toy{}, FileName: "base.toy", SizeBytes: 100 << 10}
	onLarger.Name, onLarger.Base = "on larger", &formattest.Base{Format: raw.Format{}, SizeBytes: 200 << 10}
	stream := formattest.Factory{Name: "stream", Format: toy{bug: bug, stream: true}, SizeBytes: 160<<10 + 512, FilledOnly: true}
	return []formattest.Factory{toyFactory(), encrypted, onRaw, onSmaller, onLarger, stream}
}

const bugVariable = "IMGDISK_TOY_BUG"

func TestConformance(t *testing.T) {
	formattest.Run(t, factories()...)
}

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, toyFactory()) }

func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()...) }
