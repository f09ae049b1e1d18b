package vmkernel

import (
	"slices"
	"testing"
)

func TestOlder(t *testing.T) {
	sorted := []string{
		"linux-image-6.1.0-9-amd64", "linux-image-6.1.0-47-amd64", "linux-image-6.1.0-56-amd64",
		"linux-image-6.12.9+deb12-amd64", "linux-image-6.12.100+deb12-amd64", "linux-image-6.12.117+deb12-amd64",
	}
	for i, a := range sorted {
		for j, b := range sorted {
			if older(a, b) != (i < j) {
				t.Errorf("older(%s, %s) = %v", a, b, i >= j)
			}
		}
	}
}

func TestClosure(t *testing.T) {
	depends := map[string][]string{
		"ext4": {"jbd2", "crc16", "builtin"}, "jbd2": {"crc32c"}, "crc32c": nil, "crc16": nil,
		"nfsd": {"sunrpc", "lockd", "acl"}, "lockd": {"sunrpc", "grace"}, "acl": {"sunrpc"}, "sunrpc": {"crc32c"}, "grace": nil,
	}
	for name, want := range map[string][]string{
		"crc16": nil, "ext4": {"crc16", "jbd2", "crc32c"}, "nfsd": {"acl", "lockd", "grace", "sunrpc", "crc32c"},
	} {
		if got := closure(depends, name); !slices.Equal(got, want) {
			t.Errorf("%s needs %q, want %q", name, got, want)
		}
	}
}
