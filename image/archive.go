package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// program is where the image has the driver.
const program = "usr/local/bin/csi-imgdisk"

// descriptor is OCI's, of a blob.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// writeArchive writes an OCI image layout with one image, and docker's manifest, as a tar.
// The layer is made in a file beside the archive first, because its digest names it.
func writeArchive(b build, epoch time.Time) (err error) {
	layer, err := os.CreateTemp(filepath.Dir(b.out), ".layer-")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	diffID, digest, err := writeLayer(layer, b, epoch)
	if err != nil {
		return err
	}
	size, err := layer.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	config, err := json.Marshal(imageConfig(diffID, epoch))
	if err != nil {
		return err
	}
	configDesc := describe("application/vnd.oci.image.config.v1+json", config)
	layerDesc := descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar+gzip", Digest: "sha256:" + digest, Size: size}
	manifest, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": configDesc, "layers": []descriptor{layerDesc},
	})
	if err != nil {
		return err
	}
	manifestDesc := describe("application/vnd.oci.image.manifest.v1+json", manifest)
	_, tag, _ := strings.Cut(b.name[strings.LastIndexByte(b.name, '/')+1:], ":")
	manifestDesc.Annotations = map[string]string{
		"io.containerd.image.name": b.name, "org.opencontainers.image.ref.name": tag,
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []descriptor{manifestDesc},
	})
	if err != nil {
		return err
	}
	docker, err := json.Marshal([]map[string]any{{
		"Config": blobPath(configDesc), "RepoTags": []string{b.name}, "Layers": []string{blobPath(layerDesc)},
	}})
	if err != nil {
		return err
	}

	out, err := os.Create(b.out)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := out.Close(); err == nil {
			err = closeErr
		}
	}()
	w := tar.NewWriter(out)
	for _, f := range []struct {
		name string
		data []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{"index.json", index},
		{"manifest.json", docker},
		{blobPath(configDesc), config},
		{blobPath(manifestDesc), manifest},
	} {
		if err := addFile(w, f.name, int64(len(f.data)), bytes.NewReader(f.data), epoch); err != nil {
			return err
		}
	}
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := addFile(w, blobPath(layerDesc), size, layer, epoch); err != nil {
		return err
	}
	return w.Close()
}

func describe(mediaType string, data []byte) descriptor {
	sum := sha256.Sum256(data)
	return descriptor{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(data))}
}

func blobPath(d descriptor) string { return "blobs/sha256/" + strings.TrimPrefix(d.Digest, "sha256:") }

func addFile(w *tar.Writer, name string, size int64, from io.Reader, epoch time.Time) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: epoch, Format: tar.FormatPAX}
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	_, err := io.Copy(w, from)
	return err
}

func imageConfig(diffID string, epoch time.Time) map[string]any {
	return map[string]any{
		"created": epoch.Format(time.RFC3339), "architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{
			"Entrypoint": []string{"/" + program},
			"Env":        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			"Labels": map[string]string{
				"org.opencontainers.image.title": "csi-imgdisk", "org.opencontainers.image.licenses": "Apache-2.0",
				"org.opencontainers.image.source": "https://github.com/csi-imgdisk/csi-imgdisk",
			},
		},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + diffID}},
		"history": []map[string]string{{"created": epoch.Format(time.RFC3339), "created_by": "image/main.go"}},
	}
}

// writeLayer writes the root file system and the program as a compressed tar, and returns
// the digests of the tar and of what is written.
func writeLayer(to io.Writer, b build, epoch time.Time) (diffID, digest string, err error) {
	outer, inner := sha256.New(), sha256.New()
	zip, err := gzip.NewWriterLevel(io.MultiWriter(to, outer), gzip.DefaultCompression)
	if err != nil {
		return "", "", err
	}
	w := tar.NewWriter(io.MultiWriter(zip, inner))
	l := layerWriter{w, b.rootfs, epoch, map[uint64]string{}}
	// Sorted by name, which WalkDir promises.
	if err := filepath.WalkDir(b.rootfs, l.add); err != nil {
		return "", "", err
	}
	if err := l.addProgram(b.binary); err != nil {
		return "", "", err
	}
	if err := w.Close(); err != nil {
		return "", "", err
	}
	if err := zip.Close(); err != nil {
		return "", "", err
	}
	return sum(inner), sum(outer), nil
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }

// layerWriter adds a directory's files to a tar.
type layerWriter struct {
	w      *tar.Writer
	root   string
	epoch  time.Time
	linked map[uint64]string // names by inode, of files that have several
}

func (l layerWriter) add(path string, entry fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	name, err := filepath.Rel(l.root, path)
	if err != nil || name == "." || name == program {
		return err
	}
	info, err := entry.Info()
	if err != nil {
		return err
	}
	var link string
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	case !info.IsDir() && !info.Mode().IsRegular():
		return nil // devices and sockets: a container gets its own
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	l.neutral(header, name)
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode().IsRegular() && st.Nlink > 1 {
		if first, ok := l.linked[st.Ino]; ok {
			header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
			return l.w.WriteHeader(header)
		}
		l.linked[st.Ino] = name
	}
	if err := l.w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
		return err
	}
	return l.copy(path)
}

// neutral removes what differs between builds.
func (l layerWriter) neutral(header *tar.Header, name string) {
	header.Name = filepath.ToSlash(name)
	if header.Typeflag == tar.TypeDir {
		header.Name += "/"
	}
	header.Uname, header.Gname = "", ""
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	header.ModTime = header.ModTime.Truncate(time.Second)
	if header.ModTime.After(l.epoch) {
		header.ModTime = l.epoch
	}
	header.Format = tar.FormatPAX
}

func (l layerWriter) copy(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(l.w, f)
	return err
}

func (l layerWriter) addProgram(binary string) error {
	info, err := os.Stat(binary)
	if err != nil {
		return fmt.Errorf("the program: %w", err)
	}
	header := &tar.Header{Typeflag: tar.TypeReg, Name: program, Size: info.Size(), Mode: 0o755, ModTime: l.epoch, Format: tar.FormatPAX}
	if err := l.w.WriteHeader(header); err != nil {
		return err
	}
	return l.copy(binary)
}
