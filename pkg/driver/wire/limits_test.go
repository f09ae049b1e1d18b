package wire_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// TestLimits changes a volume's limits while it is in use, and reads the device within
// them.
func TestLimits(t *testing.T) {
	w := newWorld(t)
	v := w.volume("limited", "block")
	v.must("create", v.create(64*mib, nil, map[string]string{"iops": "1000", "bandwidth": "50Mi"}))
	v.up()
	if got, want := w.limits(), (filter.Limits{IOPS: 1000, BytesPerSecond: 50 * mib}); got != want {
		t.Errorf("limits of the StorageClass came to be %+v, want %+v", got, want)
	}
	want := filter.Limits{IOPS: filter.MinIOPS, BytesPerSecond: filter.MinBytesPerSecond}
	_, err := w.controller.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{
		VolumeId: v.id, MutableParameters: map[string]string{"iops": "10", "bandwidth": "1Mi"},
	})
	v.must("modify", err)
	for start := time.Now(); w.limits() != want; time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > time.Minute {
			t.Fatalf("the server keeps to %+v, want %+v", w.limits(), want)
		}
	}
	start := time.Now()
	wantDevice(t, v.target, make([]byte, 4*mib))
	if took := time.Since(start); took < 2500*time.Millisecond {
		t.Errorf("4 MiB at 1 MiB/s were read in %v", took)
	}
	v.down()
	v.must("delete", v.remove())
}

// limits returns what the server of the only device keeps to.
func (w *world) limits() filter.Limits {
	w.t.Helper()
	var devices []struct {
		Totals struct {
			Limits filter.Limits `json:"limits"`
		} `json:"totals"`
	}
	out := w.command("devices", "-o", "json", "--run-dir", w.path("run"))
	if err := json.Unmarshal([]byte(out), &devices); err != nil || len(devices) != 1 {
		w.t.Fatalf("devices: %v in %s", err, out)
	}
	return devices[0].Totals.Limits
}
