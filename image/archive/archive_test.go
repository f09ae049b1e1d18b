package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var newest = time.Unix(1000000000, 0)

// makeRoot makes a small root file system. Its files are as old as now, in an order of
// their own.
func makeRoot(t *testing.T, names ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range names {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	err := errors.Join(os.Symlink("a", filepath.Join(root, "link")), os.Link(filepath.Join(root, "a"), filepath.Join(root, "twin")))
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// makeArchive makes one of two images that share a layer.
func makeArchive(t *testing.T, root string) []byte {
	t.Helper()
	dir := t.TempDir()
	base, err := WriteLayer(filepath.Join(dir, "base"), Content{Root: root, Newest: newest})
	if err != nil {
		t.Fatal(err)
	}
	if base, err = OpenLayer(base.Path); err != nil {
		t.Fatal(err)
	}
	top, err := WriteLayer(filepath.Join(dir, "top"), Content{Newest: newest, Files: []File{
		{Name: "bin/tool", Mode: 0o755 | fs.ModeSetuid, From: filepath.Join(root, "a")},
		{Name: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{Name: "etc/name", Mode: 0o644, Data: []byte("top")},
		{Name: "bin/other", Link: "tool"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "image.tar")
	err = Write(path, newest.Add(time.Millisecond),
		Image{Names: []string{"example.org:5000/x/imgdisk:v1", "other:v2"}, Layers: []Layer{base, top}, Entrypoint: []string{"/bin/tool"}, User: "65534"},
		Image{Names: []string{"example.org/base:v1"}, Layers: []Layer{base}, Cmd: []string{"/a"}})
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// entries returns what a tar has, by name, and fails if it has a name twice.
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
		if headers[h.Name] != nil {
			t.Errorf("%s is there twice", h.Name)
		}
		headers[h.Name] = h
		if contents[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func unmarshal(t *testing.T, data []byte, to any) {
	t.Helper()
	if err := json.Unmarshal(data, to); err != nil {
		t.Fatalf("%v: %s", err, data)
	}
}

func TestWrite_Reproducible(t *testing.T) {
	first := makeArchive(t, makeRoot(t, "b/c", "a"))
	second := makeArchive(t, makeRoot(t, "a", "b/c"))
	if !bytes.Equal(first, second) {
		t.Error("the same files make different archives")
	}
}

// Every blob has the name that its contents have, and whoever reads OCI's index finds what
// docker's manifest has.
func TestWrite_Layout(t *testing.T) {
	_, blobs := entries(t, bytes.NewReader(makeArchive(t, makeRoot(t, "a", "b/c"))))
	for name, data := range blobs {
		if want, ok := strings.CutPrefix(name, "blobs/sha256/"); ok && "sha256:"+want != digestOf(data) {
			t.Errorf("%s has other contents", name)
		}
	}
	var docker []dockerImage
	unmarshal(t, blobs["manifest.json"], &docker)
	var index struct{ Manifests []descriptor }
	unmarshal(t, blobs["index.json"], &index)
	if len(docker) != 2 || len(index.Manifests) != 3 {
		t.Fatalf("%d images with %d names", len(docker), len(index.Manifests))
	}
	if diff := cmp.Diff([]string{"example.org:5000/x/imgdisk:v1", "other:v2"}, docker[0].RepoTags); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if got, want := index.Manifests[0].Annotations, map[string]string{
		"io.containerd.image.name": "example.org:5000/x/imgdisk:v1", "org.opencontainers.image.ref.name": "v1",
	}; !cmp.Equal(got, want) {
		t.Errorf("the first name is %v", got)
	}
	for i, image := range []int{0, 0, 1} {
		var manifest struct {
			Config descriptor
			Layers []descriptor
		}
		unmarshal(t, blobs[blobPath(index.Manifests[i])], &manifest)
		if blobPath(manifest.Config) != docker[image].Config || len(manifest.Layers) != len(docker[image].Layers) {
			t.Errorf("name %d: %+v in OCI's index, %+v in docker's manifest", i, manifest, docker[image])
		}
		for j, layer := range manifest.Layers {
			if blobPath(layer) != docker[image].Layers[j] || int64(len(blobs[blobPath(layer)])) != layer.Size {
				t.Errorf("name %d, layer %d: %+v, and %s", i, j, layer, docker[image].Layers[j])
			}
		}
	}
}

// layerOf returns the files of a layer, and checks the digest in the image's configuration.
func layerOf(t *testing.T, blobs map[string][]byte, image dockerImage, n int) (map[string]*tar.Header, map[string][]byte) {
	t.Helper()
	var config struct {
		Created string
		Rootfs  struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	unmarshal(t, blobs[image.Config], &config)
	zipped, err := gzip.NewReader(bytes.NewReader(blobs[image.Layers[n]]))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := io.ReadAll(zipped)
	if err != nil {
		t.Fatal(err)
	}
	if got := config.Rootfs.DiffIDs[n]; got != digestOf(layer) {
		t.Errorf("layer %d: diff id %s, contents have %s", n, got, digestOf(layer))
	}
	if config.Created != "2001-09-09T01:46:40Z" {
		t.Errorf("created %s", config.Created)
	}
	return entries(t, bytes.NewReader(layer))
}

func TestWriteLayer_Root(t *testing.T) {
	_, blobs := entries(t, bytes.NewReader(makeArchive(t, makeRoot(t, "a", "b/c"))))
	var docker []dockerImage
	unmarshal(t, blobs["manifest.json"], &docker)
	headers, contents := layerOf(t, blobs, docker[0], 0)
	for name, h := range headers {
		if h.ModTime.After(newest) {
			t.Errorf("%s is younger than it should be: %v", name, h.ModTime)
		}
	}
	if string(contents["b/c"]) != "b/c" || headers["b/c"].Mode != 0o640 {
		t.Errorf("b/c: %q, %+v", contents["b/c"], headers["b/c"])
	}
	if h := headers["link"]; h == nil || h.Typeflag != tar.TypeSymlink || h.Linkname != "a" {
		t.Errorf("link: %+v", h)
	}
	if h := headers["twin"]; h == nil || h.Typeflag != tar.TypeLink || h.Linkname != "a" {
		t.Errorf("twin: %+v", h)
	}
}

func TestWriteLayer_Files(t *testing.T) {
	_, blobs := entries(t, bytes.NewReader(makeArchive(t, makeRoot(t, "a", "b/c"))))
	var docker []dockerImage
	unmarshal(t, blobs["manifest.json"], &docker)
	headers, contents := layerOf(t, blobs, docker[0], 1)
	if h := headers["bin/tool"]; h == nil || h.Mode != 0o4755 || string(contents["bin/tool"]) != "a" || h.Uid != 0 {
		t.Errorf("bin/tool: %+v, %q", h, contents["bin/tool"])
	}
	if h := headers["tmp/"]; h == nil || h.Mode != 0o1777 || h.Typeflag != tar.TypeDir {
		t.Errorf("tmp: %+v", h)
	}
	if h := headers["bin/other"]; h == nil || h.Linkname != "tool" {
		t.Errorf("bin/other: %+v", h)
	}
	if string(contents["etc/name"]) != "top" || !headers["etc/name"].ModTime.Equal(newest) {
		t.Errorf("etc/name: %q, %+v", contents["etc/name"], headers["etc/name"])
	}
}

func TestWriteLayer_FileReplacesRoots(t *testing.T) {
	path := filepath.Join(t.TempDir(), "layer")
	_, err := WriteLayer(path, Content{Root: makeRoot(t, "a"), Files: []File{{Name: "a", Mode: 0o600, Data: []byte("other")}}})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	if _, contents := entries(t, zipped); string(contents["a"]) != "other" {
		t.Errorf("a: %q", contents["a"])
	}
}

func TestWrite_LayerHasChanged(t *testing.T) {
	dir := t.TempDir()
	layer, err := WriteLayer(filepath.Join(dir, "layer"), Content{Files: []File{{Name: "a", Data: []byte("a")}}})
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(layer.Path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(layer.Path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	err = Write(filepath.Join(dir, "image.tar"), newest, Image{Names: []string{"a:b"}, Layers: []Layer{layer}})
	if err == nil || !strings.Contains(err.Error(), "has changed") {
		t.Errorf("a changed layer: %v", err)
	}
}
