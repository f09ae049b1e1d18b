package main

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
	depends := map[string][]string{"ext4": {"jbd2", "crc16", "builtin"}, "jbd2": {"crc32c"}, "crc32c": nil, "crc16": nil}
	if got, want := closure(depends, "ext4"), []string{"jbd2", "crc32c", "crc16"}; !slices.Equal(got, want) {
		t.Errorf("closure %q, want %q", got, want)
	}
}
