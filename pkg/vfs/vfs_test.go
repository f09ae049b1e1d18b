package vfs_test

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		".": true, "a": true, "a/b": true, "..a": true, "a..": true, "a:b": true, `a\b`: true, " ": true, "\u00fc": true, "a\nb": true,
		"": false, "/": false, "/a": false, "a/": false, "a//b": false, "..": false, "../a": false, "a/../b": false, "a/.": false,
		"./a": false, "a\x00": false, "a\xff": false,
	} {
		err := vfs.CheckName(name)
		if (err == nil) != ok || err != nil && !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("CheckName(%q) = %v, want ok=%v", name, err, ok)
		}
	}
}

func TestResolve(t *testing.T) {
	for _, c := range []struct {
		base, link, want string // want "" for refused
	}{
		{"f", "g", "g"},
		{"f", "d/g", "d/g"},
		{"f", "./g", "g"},
		{"d/f", "g", "d/g"},
		{"d/f", "../g", "g"},
		{"d/f", "../e/g", "e/g"},
		{"d/f", ".//..//e/./g", "e/g"},
		{"d/f", "x/../g", "d/g"},
		{"a/b/c", "../../g", "g"},
		{"d/f", `C\g`, `d/C\g`},
		{"d/f", `..\..\g`, `d/..\..\g`},
		{"d/f", "a/b:c", "d/a/b:c"},
		{"d/f", "./b:c", "d/b:c"},
		{"d/f", "f", "d/f"},

		{"f", "", ""},
		{"f", ".", ""},
		{"f", "..", ""},
		{"f", "../f", ""},
		{"d/f", "..", ""},
		{"d/f", "../..", ""},
		{"d/f", "../../g", ""},
		{"d/f", "e/../../../g", ""},
		{"d/f", "/g", ""},
		{"d/f", "//host/g", ""},
		{"d/f", "json:{}", ""},
		{"d/f", "nbd://host/g", ""},
		{"d/f", "C:/g", ""},
		{"d/f", `C:\g`, ""},
		{"d/f", ":g", ""},
		{"d/f", "file:g", ""},
		{"d/f", "g\x00", ""},
		{"d/f", "g\xff", ""},
	} {
		got, err := vfs.Resolve(c.base, c.link)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("Resolve(%q, %q) = %q, %v; want %q", c.base, c.link, got, err, c.want)
		}
	}
}

func TestRelativeLink(t *testing.T) {
	for _, c := range []struct{ base, target, want string }{
		{"f", "g", "g"},
		{"f", "d/g", "d/g"},
		{"d/f", "g", "../g"},
		{"d/f", "d/g", "g"},
		{"d/f", "d/e/g", "e/g"},
		{"d/f", "e/g", "../e/g"},
		{"a/b/f", "a/c/g", "../c/g"},
		{"a/b/f", "a", "../../a"},
		{"volumes/v/v-1.vmdk", "images/base.vmdk", "../../images/base.vmdk"},
		{"d/f", "d", "../d"},
	} {
		if got := vfs.RelativeLink(c.base, c.target); got != c.want {
			t.Errorf("RelativeLink(%q, %q) = %q, want %q", c.base, c.target, got, c.want)
		}
	}
}

// A target with a colon in its first part must come back, too: it would look like a
// scheme.
func TestRelativeLink_Colon(t *testing.T) {
	for _, c := range [][2]string{{"f", "a:b"}, {"d/f", "d/nbd:g"}, {"d/f", "e:/g"}} {
		link := vfs.RelativeLink(c[0], c[1])
		if got, err := vfs.Resolve(c[0], link); got != c[1] || err != nil {
			t.Errorf("Resolve(%q, %q) = %q, %v; want %q", c[0], link, got, err, c[1])
		}
	}
}

func FuzzResolve(f *testing.F) {
	for _, seed := range [][2]string{
		{"d/f", "../g"}, {"f", "json:{}"}, {"a/b/c", "../../../x"}, {"a/b", ".//x/../y"}, {"a", `..\x`}, {"a:b/c", "d:e"}, {"a", "./b:c"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, base, link string) {
		if vfs.CheckName(base) != nil || base == "." {
			return
		}
		name, err := vfs.Resolve(base, link)
		if err != nil {
			if name != "" || !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("Resolve(%q, %q) = %q, %v", base, link, name, err)
			}
			return
		}
		if err := vfs.CheckName(name); err != nil || name == "." {
			t.Errorf("Resolve(%q, %q) = %q: %v", base, link, name, err)
		}
		const root = "/some/root"
		if host := filepath.Join(root, filepath.Dir(base), link); host != filepath.Join(root, name) || !strings.HasPrefix(host, root+"/") {
			t.Errorf("Resolve(%q, %q) = %q, but a kernel would open %s", base, link, name, host)
		}
		back := vfs.RelativeLink(base, name)
		if again, err := vfs.Resolve(base, back); again != name || err != nil {
			t.Errorf("RelativeLink(%q, %q) = %q, which resolves to %q, %v", base, name, back, again, err)
		}
	})
}
