package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestParseHandle(t *testing.T) {
	for text, want := range map[string]handle{
		"main/pvc-1":                    {store: "main", volume: "pvc-1"},
		"a.b_c-d/V1":                    {store: "a.b_c-d", volume: "V1"},
		"main/images":                   {store: "main", volume: "images"},
		"main/images/disk.vmdk":         {store: "main", image: "disk.vmdk"},
		"main/images/dir/My Disk.vmdk":  {store: "main", image: "dir/My Disk.vmdk"},
		"main/images%2Fdir%2Fdisk.vmdk": {store: "main", volume: "images%2Fdir%2Fdisk.vmdk"},
	} {
		got, err := parseHandle(text)
		if err != nil || got != want || got.String() != text {
			t.Errorf("%s: got %+v (%s), %v", text, got, got, err)
		}
	}
	for _, text := range []string{
		"x", "/", "main/", "/v", "main//v", "main/a/b", "main/../v", "main/.", "main/..", "Main/v", "main/v@s",
		"main/images/", "main/images/../x", "main/images//x", "main/images/a\\b", "main/a\x00b", strings.Repeat("s", 33) + "/v",
	} {
		if got, err := parseHandle(text); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("%q: got %+v, %v, want ErrNotFound", text, got, err)
		}
	}
	if _, err := parseHandle(""); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("empty: %v, want ErrInvalid", err)
	}
}

func TestParseSnapshotHandle(t *testing.T) {
	got, err := parseSnapshotHandle("main/v@s")
	if err != nil || got != (snapshotHandle{"main", "v", "s"}) || got.String() != "main/v@s" || got.within() != "v@s" {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, text := range []string{"x", "main/v", "v@s", "main/v@", "main/@s", "main/v@s@t", "main/v@../s", "main/a/v@s"} {
		if got, err := parseSnapshotHandle(text); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("%q: got %+v, %v, want ErrNotFound", text, got, err)
		}
	}
}

func TestNameFor(t *testing.T) {
	const pvc, snapshot = "pvc-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f", "snapshot-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f"
	seen := map[string]string{}
	for _, name := range []string{
		pvc, snapshot, "a", "a.b", "A", "a b", "a/b", "../../etc", "...", "äöü", "a.", "con:aux", strings.Repeat("x", 128), strings.Repeat("x", 127) + "y",
	} {
		got, err := nameFor(name)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if len(got) > maxNameBytes || !names.MatchString(got) {
			t.Errorf("%q: %q is no good name", name, got)
		}
		if other, ok := seen[got]; ok {
			t.Errorf("%q and %q both become %q", name, other, got)
		}
		seen[got] = name
		if again, _ := nameFor(name); again != got {
			t.Errorf("%q: %q and then %q", name, got, again)
		}
	}
	for _, name := range []string{pvc, snapshot, "a", "a.b"} {
		if seen[name] != name {
			t.Errorf("%q does not stay as it is", name)
		}
	}
	for _, name := range []string{"", strings.Repeat("x", 129)} {
		if got, err := nameFor(name); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%q: got %q, %v, want ErrInvalid", name, got, err)
		}
	}
	longest := snapshotHandle{strings.Repeat("s", maxStoreBytes), strings.Repeat("v", maxNameBytes), strings.Repeat("n", maxNameBytes)}
	if n := len(longest.String()); n > maxFieldBytes {
		t.Errorf("a snapshot's handle can have %d bytes, CSI allows %d", n, maxFieldBytes)
	}
}
