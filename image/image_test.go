package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// makeRootfs makes a small root file system. Its files are as old as now, in an order of
// their own.
func makeRootfs(t *testing.T, names ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range names {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	status := "Package: xfsprogs\nStatus: install ok installed\nArchitecture: amd64\nVersion: 6.1.0-1\nDescription: tools\n for: xfs\n\n" +
		"Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
	path := filepath.Join(root, "var/lib/dpkg/status")
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(status), 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(root, "a"), filepath.Join(root, "twin")); err != nil {
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

// entries returns what a tar has, by name.
func entries(t *testing.T, data io.Reader) (headers map[string]*tar.Header, contents map[string][]byte) {
	t.Helper()
	headers, contents = map[string]*tar.Header{}, map[string][]byte{}
	for r := tar.NewReader(data); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers, contents
		}
		if err != nil {
			t.Fatal(err)
		}
		headers[h.Name] = h
		if contents[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestReproducible(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	first, bom := makeImage(t, makeRootfs(t, "b/c", "a"))
	second, bom2 := makeImage(t, makeRootfs(t, "a", "b/c"))
	if !bytes.Equal(first, second) {
		t.Error("the same files make different archives")
	}
	if diff := cmp.Diff(bom, bom2); diff != "" {
		t.Errorf("the same files make different bills of materials:\n%s", diff)
	}
	for _, want := range []string{"pkg:deb/debian/xfsprogs@6.1.0-1?arch=amd64", "pkg:golang/stdlib@"} {
		if !strings.Contains(bom, want) {
			t.Errorf("the bill of materials lacks %s", want)
		}
	}
	if strings.Contains(bom, "gone") {
		t.Error("the bill of materials has a package that was removed")
	}
}

// Every blob has the name that its contents have, and the layer has the files.
func TestArchive(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	archive, _ := makeImage(t, makeRootfs(t, "a", "b/c"))
	_, blobs := entries(t, bytes.NewReader(archive))
	for name, data := range blobs {
		digest := sha256.Sum256(data)
		if want, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && want != hex.EncodeToString(digest[:]) {
			t.Errorf("%s has other contents", name)
		}
	}
	var docker []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(blobs["manifest.json"], &docker); err != nil || len(docker) != 1 {
		t.Fatalf("manifest.json: %v: %s", err, blobs["manifest.json"])
	}
	if diff := cmp.Diff([]string{"example.org/x/imgdisk:v1"}, docker[0].RepoTags); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	var config struct {
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(blobs[docker[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	zipped, err := gzip.NewReader(bytes.NewReader(blobs[docker[0].Layers[0]]))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := io.ReadAll(zipped)
	if err != nil {
		t.Fatal(err)
	}
	diffID := sha256.Sum256(layer)
	if got, want := config.Rootfs.DiffIDs, []string{"sha256:" + hex.EncodeToString(diffID[:])}; !cmp.Equal(got, want) {
		t.Errorf("diff ids %q, want %q", got, want)
	}
	headers, contents := entries(t, bytes.NewReader(layer))
	epoch := time.Unix(1000000000, 0)
	for name, h := range headers {
		if h.ModTime.After(epoch) {
			t.Errorf("%s is younger than the source: %v", name, h.ModTime)
		}
	}
	if string(contents["b/c"]) != "b/c" || headers["b/c"].Mode != 0o640 {
		t.Errorf("b/c: %q, mode %o", contents["b/c"], headers["b/c"].Mode)
	}
	if h := headers["link"]; h == nil || h.Linkname != "a" {
		t.Errorf("link: %+v", h)
	}
	if h := headers["twin"]; h == nil || h.Typeflag != tar.TypeLink || h.Linkname != "a" {
		t.Errorf("twin: %+v", h)
	}
	if h := headers[program]; h == nil || h.Mode != 0o755 || h.Size == 0 {
		t.Errorf("%s: %+v", program, h)
	}
}
