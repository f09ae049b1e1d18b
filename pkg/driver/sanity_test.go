package driver

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/drivertest"
)

// TestSanity runs csi-sanity against the driver on fakes. Package wire runs it against
// the real thing.
func TestSanity(t *testing.T) {
	b := newBench(t)
	drivertest.Sanity(t, "unix://"+b.socket)
	if len(b.mounter.mounts) > 0 || len(b.attacher.devices) > 0 {
		t.Errorf("left: mounts %v, devices %v", b.mounter.mounts, b.attacher.devices)
	}
}
