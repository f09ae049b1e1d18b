// Package archive writes container images without a container engine.
//
//	base, err := archive.WriteLayer("base.tar.gz", archive.Content{Root: "rootfs"})
//	err = archive.Write("image.tar", created, archive.Image{Names: []string{"example.org/a:v1"}, Layers: []archive.Layer{base}})
//
// An archive is an OCI image layout and docker's at once: `ctr images import`, `docker load` and
// `skopeo copy oci-archive:` take it. The same files make the same bytes: nothing in an
// archive depends on when, where, by whom or in which order of directory entries it was made.
//
// Formats: OCI image specification 1.1 (image-layout.md, manifest.md, config.md, layer.md) and
// Docker image specification 1.2.
package archive
