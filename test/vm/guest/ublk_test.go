package guest

import (
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/attachtest"
)

// probeUBLK skips the rest of a test where the kernel has no ublk, once it has checked
// that Probe says so.
func probeUBLK(t *testing.T) {
	t.Helper()
	inGuest(t)
	err := attach.NewUBLK().Probe(t.Context())
	if resends(t) { // the same kernels have ublk
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "kernel module ublk_drv is not available") || !strings.Contains(err.Error(), "Linux 6.5") {
		t.Errorf("Probe on a kernel without ublk: %v", err)
	}
	t.SkipNow()
}

func TestUBLK(t *testing.T) {
	probeUBLK(t)
	attachtest.Run(t, attachtest.Config{Transport: "ublk", Kills: 2 * kills})
}

// TestUBLKConfined: a server that can make no rings, open no devices and has no
// privileges serves all the same.
func TestUBLKConfined(t *testing.T) {
	probeUBLK(t)
	attachtest.Run(t, attachtest.Config{Transport: "ublk", Kills: kills, Confined: true, Only: []string{"Data", "Zeroes", "Errors", "KillServer", "HandOver"}})
}
