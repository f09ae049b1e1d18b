package driver

import (
	"path"
	"strings"
	"testing"
)

// FuzzHandles checks that what is understood is written the same, and that nothing that
// is understood leads out of a store.
func FuzzHandles(f *testing.F) {
	for _, seed := range []string{"main/v", "main/images/a/b.vmdk", "main/v@s", "main/../x", "main/images/../../x", "a/b@c@d"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if h, err := parseHandle(text); err == nil {
			if h.String() != text {
				t.Errorf("%q became %q", text, h)
			}
			if file := path.Join("/images", h.image); !strings.HasPrefix(file, "/images") || strings.Contains(h.volume, "/") || h.volume == ".." {
				t.Errorf("%q leads out of the store: %+v", text, h)
			}
		}
		if h, err := parseSnapshotHandle(text); err == nil && h.String() != text {
			t.Errorf("%q became %q", text, h)
		}
		if name, err := nameFor(text); err == nil {
			if _, err := parseHandle("s/" + name); err != nil {
				t.Errorf("%q became %q: %v", text, name, err)
			}
		}
	})
}

// FuzzTokens checks that only the driver's own tokens are understood.
func FuzzTokens(f *testing.F) {
	f.Add(newToken("main/v"))
	f.Add("invalid-token")
	f.Fuzz(func(t *testing.T, token string) {
		if last, err := parseToken(token); err == nil && token != "" {
			if again, err := parseToken(newToken(last)); err != nil || again != last {
				t.Errorf("%q means %q, and then %q, %v", token, last, again, err)
			}
		}
	})
}

// FuzzSizes checks that sizes are written as they are read.
func FuzzSizes(f *testing.F) {
	for _, seed := range []string{"64Ki", "1M", "9223372036854775807", "", "Ki"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if size, err := ParseSize(text); err == nil {
			if again, err := ParseSize(formatSize(size)); err != nil || again != size || size < 0 {
				t.Errorf("%q is %d, written %s", text, size, formatSize(size))
			}
		}
	})
}
