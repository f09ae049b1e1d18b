package formattest_test

import (
	"os"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
)

// toyFactory describes images of a format without bugs, or with the one that
// TestSuite_FindsBugs asks for.
func toyFactory() formattest.Factory {
	return formattest.Factory{
		Name: "toy", Format: toy{bug: toyBug(os.Getenv(bugVariable))}, Overlay: new(formats.CreateRequest), SizeBytes: 160<<10 + 512, CanShrink: true,
	}
}

const bugVariable = "IMGDISK_TOY_BUG"

func TestConformance(t *testing.T) {
	encrypted := toyFactory()
	encrypted.Name, encrypted.Format = "encrypted", toy{encrypted: true}
	formattest.Run(t, toyFactory(), encrypted)
}

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, toyFactory()) }
