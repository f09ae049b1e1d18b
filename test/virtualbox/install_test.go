package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLibraries(t *testing.T) {
	depends := "iproute2, virtualbox-dkms (>= 7.2) | virtualbox-source (>= 7.2) | virtualbox-modules, python3:any, " +
		"libc6 (>= 2.42), libsdl2-2.0-0 (>= 2.0.12), libgl1, libxml2-16 (>= 2.14) | libxml2, zlib1g:amd64 (>= 1:1.2), libc6,,\n"
	want := []string{"libc6", "libxml2-16", "zlib1g"}
	if diff := cmp.Diff(want, libraries(depends)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What is there already is neither looked for nor replaced, unless that is wanted; and a
// new tree takes an old one's place only when it is complete.
func TestEnsure(t *testing.T) {
	in := installer{cache: t.TempDir(), mirror: "file:" + filepath.Join(t.TempDir(), "none"), suite: "sid"}
	root := filepath.Join(in.cache, "root")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if dir, err := in.ensure(t.Context(), false); dir != root || err != nil {
		t.Errorf("what is there: %q, %v", dir, err)
	}
	if _, err := in.ensure(t.Context(), true); err == nil {
		t.Error("an update without a mirror says nothing")
	}
	entries, err := os.ReadDir(in.cache)
	if err != nil || len(entries) != 1 || entries[0].Name() != "root" {
		t.Errorf("after a failed update the cache has %v, %v", entries, err)
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, made := range []string{"fresh/first", "fresh/second"} {
		if err := os.MkdirAll(at(made), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := replace(at("root"), at("fresh"), at("old-"+filepath.Base(made))); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(at("root/" + filepath.Base(made))); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(at("old-second/first")); err != nil {
		t.Error(err)
	}
}

// The root that a program finds has the links that packages expect.
func TestMakeRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	if err := makeRoot(root); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"lib64", "bin", "work", "proc"} {
		if info, err := os.Stat(filepath.Join(root, path)); err != nil || !info.IsDir() {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
}
