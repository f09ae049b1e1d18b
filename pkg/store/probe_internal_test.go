package store

import (
	"strings"
	"testing"
)

func TestFindMount(t *testing.T) {
	info := strings.Join([]string{
		"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
		"40 22 0:50 / /srv rw - nfs4 server:/a rw,vers=4.2,local_lock=none",
		`41 22 0:51 / /srv/my\040store rw - nfs server:/b rw,vers=3,nolock,local_lock=all`,
		"42 22 0:52 / /win rw - cifs //server/c rw,nobrl",
		"43 22 0:53 / /over rw - ext4 /dev/sdb rw",
		"44 43 0:54 / /over rw - nfs4 server:/d rw,local_lock=posix",
		"garbage",
	}, "\n") + "\n"
	for dir, want := range map[string][2]string{ // mount point, option
		"/":                      {"/", ""},
		"/srv":                   {"/srv", ""},
		"/srvother":              {"/", ""},
		"/srv/x/y":               {"/srv", ""},
		"/srv/my store/deep":     {"/srv/my store", "nolock"},
		"/win/dir":               {"/win", "nobrl"},
		"/over":                  {"/over", "local_lock=posix"},
		"/home/user/../user/dir": {"/", ""},
	} {
		m, ok := findMount(info, dir)
		if !ok || m.point != want[0] || m.localLockOption() != want[1] {
			t.Errorf("%s: mount %+v with %q, want %v", dir, m, m.localLockOption(), want)
		}
	}
	if _, ok := findMount("", "/"); ok {
		t.Error("found a mount in nothing")
	}
}

func TestLayerStem(t *testing.T) {
	for _, c := range []struct{ volume, file, stem string }{
		{"v", "v.vmdk", "v"},
		{"v", "v-flat.vmdk", "v"},
		{"v", "v-s001.vmdk", "v"},
		{"v", "v-000001.vmdk", "v-000001"},
		{"v", "v-000001-flat.vmdk", "v-000001"},
		{"v", "v-00001.vmdk", "v"},
		{"v", "v-1000000.vmdk", "v-1000000"},
		{"v", "v-1000000-s001.vmdk", "v-1000000"},
		{"v", "v-000001", "v"},
		{"v", "volume.json", ""},
		{"v", "w.vmdk", ""},
		{"v", "v", ""},
		{"v-000001", "v-000001.vmdk", "v-000001"},
		{"v-000001", "v-000001-000002.vmdk", "v-000001-000002"},
		{"images%2Fa.vmdk", "images%2Fa.vmdk-000001.vmdk", "images%2Fa.vmdk-000001"},
	} {
		if stem, ok := layerStem(c.volume, c.file); stem != c.stem || ok != (c.stem != "") {
			t.Errorf("%s in %s: stem %q, %t; want %q", c.file, c.volume, stem, ok, c.stem)
		}
	}
	for _, n := range []int{0, 1, 999999, 1000000} {
		file := layerFile("v", n, "vmdk")
		if ownerOf(file) != "v" {
			t.Errorf("%s belongs to %q", file, ownerOf(file))
		}
	}
}

func TestHumanBytes(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 KiB", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 10: "10 KiB",
		1 << 30: "1 GiB", 1023 << 20: "1.0 GiB", 1 << 62: "4 EiB",
	} {
		if got := humanBytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
