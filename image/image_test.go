package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// makeRootfs makes a small root file system, as old as image/rootfs.sh leaves them.
func makeRootfs(t *testing.T) string {
	t.Helper()
	root := filepath.Join(t.TempDir(), "rootfs")
	status := "Package: xfsprogs\nStatus: install ok installed\nArchitecture: amd64\nVersion: 6.1.0-1\nDescription: tools\n for: xfs\n\n" +
		"Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
	path := filepath.Join(root, "var/lib/dpkg/status")
	old := time.Unix(900000000, 0)
	err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(status), 0o644))
	for ; path != filepath.Dir(root); path = filepath.Dir(path) {
		err = errors.Join(err, os.Chtimes(path, old, old))
	}
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func makeImage(t *testing.T, root string) (archive []byte, bom string) {
	t.Helper()
	self, err := os.Executable() // a Go program
	if err != nil {
		t.Fatal(err)
	}
	b := build{rootfs: root, binary: self, name: "example.org/x/imgdisk:v1", out: filepath.Join(t.TempDir(), "image.tar")}
	if err := b.run(); err != nil {
		t.Fatal(err)
	}
	archive, err = os.ReadFile(b.out)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(strings.TrimSuffix(b.out, ".tar") + ".spdx.json")
	if err != nil {
		t.Fatal(err)
	}
	return archive, string(text)
}

func TestReproducible(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	root := makeRootfs(t)
	first, bom := makeImage(t, root)
	again, _ := makeImage(t, root) // with the layer that the first has kept
	second, bom2 := makeImage(t, makeRootfs(t))
	if !bytes.Equal(first, second) || !bytes.Equal(first, again) {
		t.Error("the same files make different archives")
	}
	if diff := cmp.Diff(bom, bom2); diff != "" {
		t.Errorf("the same files make different bills of materials:\n%s", diff)
	}
}

func TestBillOfMaterials(t *testing.T) {
	_, bom := makeImage(t, makeRootfs(t))
	for _, want := range []string{"pkg:deb/debian/xfsprogs@6.1.0-1?arch=amd64", "pkg:golang/stdlib@"} {
		if !strings.Contains(bom, want) {
			t.Errorf("the bill of materials lacks %s", want)
		}
	}
	if strings.Contains(bom, "gone") {
		t.Error("the bill of materials has a package that was removed")
	}
}
