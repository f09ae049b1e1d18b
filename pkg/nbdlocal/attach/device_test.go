package attach

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestMountPoints(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mountinfo")
	const table = `22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw
36 22 43:1024 / /var/lib/kubelet/globalmount\040here rw - ext4 /dev/nbd1024 rw
37 22 0:55 /sub /mnt/btrfs\134tab\011 rw master:3 propagate_from:2 - btrfs /dev/nbd1024 rw
38 22 43:1025 / /other rw - xfs /dev/nbd1025 rw
39 22 43:10240 / /similar rw - xfs /dev/nbd10240 rw
too short
`
	if err := os.WriteFile(path, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"/var/lib/kubelet/globalmount here", "/mnt/btrfs\\tab\t"}
	if got := mountPoints(path, "43:1024", "/dev/nbd1024"); !slices.Equal(got, want) {
		t.Errorf("mount points %q, want %q", got, want)
	}
}

func TestFUSEFileName(t *testing.T) {
	long := strings.Repeat("/volume", 200)
	seen := map[string]bool{}
	for _, id := range []string{"store/volume", "store%2Fvolume", long, long + "x", "..", "a\nb", "имя"} {
		name := fuseFileName(id)
		if len(name) > 255 || strings.ContainsAny(name, "/\n") || seen[name] {
			t.Errorf("%q becomes %q", id, name)
		}
		seen[name] = true
	}
}

func TestCheckSpec(t *testing.T) {
	good := Spec{ID: "id", SizeBytes: 8192, BlockBytes: 4096}
	if err := checkSpec(good); err != nil {
		t.Errorf("checkSpec(%+v): %v", good, err)
	}
	for _, spoil := range []func(*Spec){
		func(s *Spec) { s.ID = "" },
		func(s *Spec) { s.ID = "a\x00b" },
		func(s *Spec) { s.ID = strings.Repeat("x", maxIDBytes+1) },
		func(s *Spec) { s.BlockBytes = 1024 },
		func(s *Spec) { s.SizeBytes = -4096 },
		func(s *Spec) { s.SizeBytes = 512 },
	} {
		spec := good
		spoil(&spec)
		if err := checkSpec(spec); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("checkSpec(%+v): %v, want ErrInvalid", spec, err)
		}
	}
}

func TestPoll(t *testing.T) {
	reason := errors.New("reason")
	ctx, cancel := context.WithCancel(t.Context())
	tries := 0
	if err := poll(ctx, time.Minute, func() (bool, error) { tries++; return tries == 3, nil }); err != nil || tries != 3 {
		t.Errorf("%v after %d tries, want 3", err, tries)
	}
	if err := poll(ctx, time.Minute, func() (bool, error) { return false, reason }); !errors.Is(err, reason) {
		t.Errorf("%v, want %v", err, reason)
	}
	if err := poll(ctx, 0, func() (bool, error) { return false, nil }); !errors.Is(err, errPollTimeout) {
		t.Errorf("%v, want %v", err, errPollTimeout)
	}
	cancel()
	if err := poll(ctx, time.Minute, func() (bool, error) { return false, nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}
