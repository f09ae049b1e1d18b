package store

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"path"
	"slices"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// TreeData is the store's layers, as they stand on each other.
type TreeData struct {
	Name     string     `json:"name"`
	Usage    vfs.Usage  `json:"usage"`
	Roots    []TreeNode `json:"roots"`
	Problems []string   `json:"problems,omitempty"` // records that cannot be read
}

// TreeNode is one layer: what stands on it are its Children.
type TreeNode struct {
	File           string         `json:"file"`
	Format         string         `json:"format,omitempty"` // "" of images that no volume uses
	AllocatedBytes int64          `json:"allocatedBytes"`   // in the store, with extent files
	Volumes        []TreeVolume   `json:"volumes,omitempty"`
	Snapshots      []TreeSnapshot `json:"snapshots,omitempty"`
	Missing        bool           `json:"missing,omitempty"` // the file is not there
	Children       []TreeNode     `json:"children,omitempty"`
}

// TreeVolume is a volume whose top a layer is.
type TreeVolume struct {
	Name      string   `json:"name"`
	SizeBytes int64    `json:"sizeBytes"`       // guest size
	Nodes     []string `json:"nodes,omitempty"` // where it is published
}

// TreeSnapshot is a snapshot whose top a layer is.
type TreeSnapshot struct {
	ID        string `json:"id"` // "<volume>@<snapshot>"
	SizeBytes int64  `json:"sizeBytes"`
}

// Tree returns which layer stands on which, sorted by file. Files in directories of
// volumes that no record names are not shown: Check reports them.
func (s *Store) Tree(ctx context.Context) (TreeData, error) {
	all, err := s.records(ctx)
	if err != nil {
		return TreeData{}, err
	}
	b := treeBuilder{store: s, nodes: map[string]*TreeNode{}, children: map[string]map[string]bool{}}
	data := TreeData{Name: s.name}
	if data.Usage, err = s.Usage(); err != nil {
		return TreeData{}, err
	}
	for _, e := range all {
		if e.Err != nil {
			data.Problems = append(data.Problems, e.Err.Error())
			continue
		}
		b.add(e.Record)
	}
	if err := b.addImages(imagesDir); err != nil {
		return TreeData{}, err
	}
	for _, root := range slices.Sorted(maps.Keys(b.children[""])) {
		data.Roots = append(data.Roots, b.build(root))
	}
	return data, nil
}

// treeBuilder collects layers by file name; children[""] are those that stand on nothing.
type treeBuilder struct {
	store    *Store
	nodes    map[string]*TreeNode
	children map[string]map[string]bool
}

// add adds the layers that a record keeps alive.
func (b *treeBuilder) add(rec Record) {
	if rec.exists() == nil {
		b.addChain(rec.Layers)
		v := TreeVolume{Name: rec.Name, SizeBytes: rec.SizeBytes}
		for _, a := range rec.Attachments {
			v.Nodes = append(v.Nodes, a.Node)
		}
		top := b.nodes[rec.top().File]
		top.Volumes = append(top.Volumes, v)
	}
	for _, snap := range rec.Snapshots {
		if chain := rec.chainTo(snap.Layer); chain != nil && !snap.isPin() {
			b.addChain(chain)
			node := b.nodes[snap.Layer]
			node.Snapshots = append(node.Snapshots, TreeSnapshot{ID: SnapshotID(rec.Name, snap.Name), SizeBytes: snap.SizeBytes})
		}
	}
}

func (b *treeBuilder) addChain(chain []LayerRecord) {
	parent := ""
	for _, l := range chain {
		b.addLayer(parent, l)
		parent = l.File
	}
}

func (b *treeBuilder) addLayer(parent string, l LayerRecord) {
	if b.children[parent] == nil {
		b.children[parent] = map[string]bool{}
	}
	b.children[parent][l.File] = true
	if b.nodes[l.File] == nil {
		node := &TreeNode{File: l.File, Format: l.Format}
		node.AllocatedBytes, node.Missing = b.store.allocated(l.File)
		b.nodes[l.File] = node
	}
}

// addImages adds images that no volume stands on.
func (b *treeBuilder) addImages(dir string) error {
	entries, err := b.store.fs.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		name := path.Join(dir, entry.Name())
		switch {
		case entry.IsDir():
			if err := b.addImages(name); err != nil {
				return err
			}
		case entry.Type().IsRegular() && b.nodes[name] == nil:
			b.addLayer("", LayerRecord{File: name})
		}
	}
	return nil
}

func (b *treeBuilder) build(file string) TreeNode {
	node := *b.nodes[file]
	for _, child := range slices.Sorted(maps.Keys(b.children[file])) {
		node.Children = append(node.Children, b.build(child))
	}
	return node
}

// allocated returns the space that a layer's files take.
func (s *Store) allocated(file string) (bytes int64, missing bool) {
	files := []string{file}
	if volume := ownerOf(file); volume != "" {
		files = append(files, s.extentFiles(volume, file)...)
	}
	for _, name := range files {
		f, err := s.fs.Open(name, vfs.ReadOnly)
		if err != nil {
			missing = missing || name == file && errors.Is(err, fs.ErrNotExist)
			continue
		}
		n, err := f.AllocatedBytes()
		f.Close()
		if err == nil {
			bytes += n
		}
	}
	return bytes, missing
}

// extentFiles lists the other files of a layer.
func (s *Store) extentFiles(volume, file string) (others []string) {
	stem, _ := layerStem(volume, path.Base(file))
	entries, err := s.fs.ReadDir(volumeDir(volume))
	if err != nil {
		return nil // the layer itself is reported as missing
	}
	for _, entry := range entries {
		name := volumeFile(volume, entry.Name())
		if other, ok := layerStem(volume, entry.Name()); ok && other == stem && name != file && !isStoreFile(entry.Name()) {
			others = append(others, name)
		}
	}
	return others
}
