// Package guest holds the tests that run inside a virtual machine of test/vm, with a
// kernel of Debian's.
package guest

import (
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/attachtest"
)

func TestMain(m *testing.M) { attachtest.Main(m) }

// inGuest skips tests elsewhere: they would take over the machine.
func inGuest(t *testing.T) {
	t.Helper()
	if os.Getenv("IMGDISK_VM_GUEST") == "" {
		t.Skip("runs in a virtual machine: make vm-test")
	}
}

// kills is how often a server is killed under load, in each test that does so. It
// takes the kernel's nbd up to three seconds to resend what was in flight.
const kills = 5

func TestNBD(t *testing.T) {
	inGuest(t)
	if err := attach.NewNBD(attach.NBDOptions{}).Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	attachtest.Run(t, attachtest.Config{Transport: "nbd", Kills: kills})
}

// TestNBDConnections: with several, the kernel leaves what was in flight at a crash
// alone for half a minute, so one crash has to do.
func TestNBDConnections(t *testing.T) {
	inGuest(t)
	attachtest.Run(t, attachtest.Config{Transport: "nbd", Connections: 3, Kills: 1, Only: []string{"Data", "KillServer", "RecoverServed"}})
}

func TestFUSE(t *testing.T) {
	inGuest(t)
	err := attach.NewFUSE().Probe(t.Context())
	if !resends(t) {
		if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "6.9") {
			t.Errorf("Probe on a kernel that can't resend: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	attachtest.Run(t, attachtest.Config{Transport: "fuse", Kills: 2 * kills})
}

// resends says whether this kernel's FUSE can have requests resent: from 6.9 on.
func resends(t *testing.T) bool {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	return !strings.HasPrefix(unix.ByteSliceToString(u.Release[:]), "6.1.")
}
