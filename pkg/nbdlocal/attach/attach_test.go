package attach_test

import (
	"os"
	"strconv"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach/attachtest"
)

func TestMain(m *testing.M) { attachtest.Main(m) }

func TestFUSE(t *testing.T) {
	testenv.Root(t)
	if err := attach.NewFUSE().Probe(t.Context()); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	kills := 20
	if testing.Short() {
		kills = 3
	}
	if s := os.Getenv("IMGDISK_KILLS"); s != "" { // for a longer look
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("IMGDISK_KILLS=%q: %v", s, err)
		}
		kills = n
	}
	attachtest.Run(t, attachtest.Config{Transport: "fuse", Kills: kills})
}
