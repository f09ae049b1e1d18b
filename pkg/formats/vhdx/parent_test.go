package vhdx

import (
	"testing"
)

func TestParentLink(t *testing.T) {
	const linkage = "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}"
	for name, c := range map[string]struct {
		locator map[string]string
		want    string // "": refused
	}{
		"beside":           {map[string]string{keyRelativePath: `.\parent.vhdx`}, "vm/parent.vhdx"},
		"plain":            {map[string]string{keyRelativePath: `parent.vhdx`}, "vm/parent.vhdx"},
		"above":            {map[string]string{keyRelativePath: `..\images\parent.vhdx`}, "images/parent.vhdx"},
		"below":            {map[string]string{keyRelativePath: `base\a b.vhdx`}, "vm/base/a b.vhdx"},
		"slashes":          {map[string]string{keyRelativePath: `./base/a.vhdx`}, "vm/base/a.vhdx"},
		"outside":          {map[string]string{keyRelativePath: `..\..\parent.vhdx`}, ""},
		"absolute":         {map[string]string{keyRelativePath: `\etc\passwd`}, ""},
		"drive":            {map[string]string{keyRelativePath: `C:\parent.vhdx`}, ""},
		"URI":              {map[string]string{keyRelativePath: `nbd://host/parent`}, ""},
		"drive elsewhere":  {map[string]string{keyWin32Path: `\\?\d:\path2\sub3\parent.vhdx`}, "vm/parent.vhdx"},
		"share elsewhere":  {map[string]string{keyWin32Path: `\\?\Server\Share\parent.vhdx`}, "vm/parent.vhdx"},
		"volume elsewhere": {map[string]string{keyVolumePath: `\\?\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\sub3\other.vhdx`}, "vm/other.vhdx"},
		"relative first":   {map[string]string{keyVolumePath: `\\?\Volume{0}\x.vhdx`, keyRelativePath: `.\y.vhdx`}, "vm/y.vhdx"},
		"a directory":      {map[string]string{keyWin32Path: `\\?\d:\path2\`}, ""},
		"parent directory": {map[string]string{keyWin32Path: `\\?\d:\path2\..`}, ""},
		"no path":          {map[string]string{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			c.locator[keyLinkage] = linkage
			m := &image{meta: &metadata{hasParent: true, locator: c.locator}}
			link, err := m.parentLink("vm/child.vhdx")
			switch {
			case c.want == "" && err == nil:
				t.Errorf("the parent is %q, want it refused", link.Name)
			case c.want != "" && (err != nil || link.Name != c.want):
				t.Errorf("the parent is %+v, error %v, want %q", link, err, c.want)
			}
		})
	}
	for _, bad := range []string{"", "{83ed0ec3-24c8}", "{83ed0ec3-24c8-49a6-a959-5e4bf1288bfz}", "+83ed0ec-24c8-49a6-a959-5e4bf1288bfb"} {
		m := &image{meta: &metadata{hasParent: true, locator: map[string]string{keyLinkage: bad, keyRelativePath: "a.vhdx"}}}
		if link, err := m.parentLink("child.vhdx"); err == nil {
			t.Errorf("linkage %q: the parent is %q, want it refused", bad, link.Name)
		}
	}
}

func TestGUID(t *testing.T) {
	const text = "2dc27766-f623-4200-9d64-115e9bfd4a08"
	g, ok := parseGUID("{2DC27766-F623-4200-9D64-115E9BFD4A08}")
	want := guid{0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08}
	if !ok || g != want || g.String() != text {
		t.Errorf("%v, %x is %s", ok, g, g)
	}
	if a, b := newGUID(), newGUID(); a == b || a == (guid{}) {
		t.Errorf("new GUIDs %s and %s", a, b)
	}
}

func TestLocator(t *testing.T) {
	want := map[string]string{keyLinkage: "{x}", keyRelativePath: `.\größer 🙂.vhdx`}
	p, err := encodeLocator(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeLocator(p)
	if err != nil || len(got) != 2 || got[keyLinkage] != want[keyLinkage] || got[keyRelativePath] != want[keyRelativePath] {
		t.Errorf("%q, error %v, want %q", got, err, want)
	}
	for _, bad := range []map[string]string{{keyRelativePath: ""}, {keyRelativePath: "a\xff"}, {keyRelativePath: "a\x00b"}} {
		if _, err := encodeLocator(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	for n := range p { // cut anywhere, it gives an error or less
		if _, err := decodeLocator(p[:n]); err == nil {
			t.Errorf("%d of %d bytes are accepted", n, len(p))
		}
	}
}
