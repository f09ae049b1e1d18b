package archive

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"
)

// Image is a container image for this machine's processor and Linux.
type Image struct {
	Names      []string // NAME:TAG; at least one
	Layers     []Layer  // from the lowest
	Entrypoint []string
	Cmd        []string
	Env        []string // NAME=VALUE
	User       string   // UID or UID:GID; root if empty
	Labels     map[string]string
}

// descriptor is OCI's, of a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"` // bytes
	Annotations map[string]string `json:"annotations,omitempty"`
}

// dockerImage is an entry of docker's manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Write makes or overwrites an archive. Layers that images share are in it once. Created is what
// the images say; sub-second parts are dropped.
func Write(path string, created time.Time, images ...Image) (err error) {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
	}()
	w := writer{tar.NewWriter(out), created.UTC().Truncate(time.Second), map[string]bool{}}
	if err := w.addAll(images); err != nil {
		return err
	}
	return w.tar.Close()
}

// writer writes one archive.
type writer struct {
	tar     *tar.Writer
	created time.Time
	blobs   map[string]bool // that it has, by digest
}

func (w writer) addAll(images []Image) error {
	var manifests []descriptor
	var docker []dockerImage
	for _, image := range images {
		manifest, entry, err := w.addImage(image)
		if err != nil {
			return err
		}
		for _, name := range image.Names {
			manifest.Annotations = map[string]string{
				"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag(name),
			}
			manifests = append(manifests, manifest)
		}
		docker = append(docker, entry)
	}
	index := map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
	}
	if err := w.addJSON("index.json", index); err != nil {
		return err
	}
	if err := w.addJSON("manifest.json", docker); err != nil {
		return err
	}
	return w.addJSON("oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"})
}

// tag returns what is behind the colon of NAME:TAG.
func tag(name string) string {
	_, tag, _ := strings.Cut(name[strings.LastIndexByte(name, '/')+1:], ":")
	return tag
}

func (w writer) addImage(image Image) (manifest descriptor, docker dockerImage, err error) {
	docker.RepoTags = image.Names
	var layers []descriptor
	for _, layer := range image.Layers {
		d := descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: layer.Digest, Size: layer.Size}
		if err := w.addLayer(layer, d); err != nil {
			return manifest, docker, fmt.Errorf("layer %s: %w", layer.Path, err)
		}
		layers = append(layers, d)
		docker.Layers = append(docker.Layers, blobPath(d))
	}
	config, err := w.addBlob("application/vnd.oci.image.config.v1+json", w.config(image))
	if err != nil {
		return manifest, docker, err
	}
	docker.Config = blobPath(config)
	manifest, err = w.addBlob("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	})
	return manifest, docker, err
}

// config is OCI's image configuration.
func (w writer) config(image Image) map[string]any {
	container := map[string]any{"Env": append([]string{}, image.Env...)}
	if len(image.Entrypoint) > 0 {
		container["Entrypoint"] = image.Entrypoint
	}
	if len(image.Cmd) > 0 {
		container["Cmd"] = image.Cmd
	}
	if image.User != "" {
		container["User"] = image.User
	}
	if len(image.Labels) > 0 {
		container["Labels"] = image.Labels
	}
	created := w.created.Format(time.RFC3339)
	var diffIDs []string
	var history []map[string]string
	for _, layer := range image.Layers {
		diffIDs = append(diffIDs, layer.DiffID)
		history = append(history, map[string]string{"created": created, "created_by": "image/archive"})
	}
	return map[string]any{
		"created": created, "architecture": runtime.GOARCH, "os": "linux", "config": container,
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}, "history": history,
	}
}

// addBlob adds a JSON document under its digest.
func (w writer) addBlob(mediaType string, document any) (descriptor, error) {
	data, err := json.Marshal(document)
	if err != nil {
		return descriptor{}, err
	}
	sum := sha256.Sum256(data)
	d := descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(data))}
	if w.blobs[d.Digest] {
		return d, nil
	}
	w.blobs[d.Digest] = true
	return d, w.add(blobPath(d), d.Size, bytes.NewReader(data))
}

// addLayer copies a layer's file under its digest, and checks that it is what it was.
func (w writer) addLayer(layer Layer, d descriptor) error {
	if w.blobs[d.Digest] {
		return nil
	}
	w.blobs[d.Digest] = true
	f, err := os.Open(layer.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	digest := sha256.New()
	if err := w.add(blobPath(d), d.Size, io.TeeReader(f, digest)); err != nil {
		return err
	}
	if got := "sha256:" + hex.EncodeToString(digest.Sum(nil)); got != d.Digest {
		return fmt.Errorf("the file has changed: it has digest %s, and was made with %s", got, d.Digest)
	}
	return nil
}

func (w writer) addJSON(name string, document any) error {
	data, err := json.Marshal(document)
	if err != nil {
		return err
	}
	return w.add(name, int64(len(data)), bytes.NewReader(data))
}

func (w writer) add(name string, size int64, from io.Reader) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: w.created, Format: tar.FormatPAX}
	if err := w.tar.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(w.tar, from)
	return err
}

func blobPath(d descriptor) string { return "blobs/sha256/" + strings.TrimPrefix(d.Digest, "sha256:") }
