package store

import (
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"
)

// Draw writes the tree for people, one line per layer:
//
//	nfs1 · 389 MiB in 4 layers · 97 GiB free
//	├─ images/debian.vmdk               vmdk   310 MiB   image
//	│  └─ web/web.vmdk                  vmdk    12 MiB   ◆ web@monday
//	│     └─ web/web-000001.vmdk        vmdk   1.2 MiB   ● web 10 GiB on node-a
//	└─ data/data.vmdk                   vmdk    66 MiB   ● data 1 GiB
//
// A dot is a volume, a diamond a snapshot.
func (t TreeData) Draw(w io.Writer) error {
	var rows []treeRow
	for i, root := range t.Roots {
		rows = appendRows(rows, root, "", i == len(t.Roots)-1)
	}
	nameWidth, sizeWidth, formatWidth := 0, 0, 0
	for _, r := range rows {
		nameWidth = max(nameWidth, utf8.RuneCountInString(r.name))
		sizeWidth = max(sizeWidth, len(r.size))
		formatWidth = max(formatWidth, len(r.format))
	}
	if _, err := fmt.Fprintf(w, "%s · %s in %d layers · %s free\n", t.Name, humanBytes(t.allocated()), len(rows), humanBytes(t.Usage.FreeBytes)); err != nil {
		return err
	}
	for _, r := range rows {
		line := fmt.Sprintf("%-*s   %-*s   %*s   %s", nameWidth, r.name, formatWidth, r.format, sizeWidth, r.size, r.what)
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " ")); err != nil {
			return err
		}
	}
	if len(rows) == 0 {
		if _, err := fmt.Fprintln(w, "└─ (empty)"); err != nil {
			return err
		}
	}
	for _, p := range t.Problems {
		if _, err := fmt.Fprintf(w, "! %s\n", p); err != nil {
			return err
		}
	}
	return nil
}

// allocated returns the space that all layers take.
func (t TreeData) allocated() (bytes int64) {
	var add func(nodes []TreeNode)
	add = func(nodes []TreeNode) {
		for _, n := range nodes {
			bytes += n.AllocatedBytes
			add(n.Children)
		}
	}
	add(t.Roots)
	return bytes
}

// treeRow is one line of the drawing.
type treeRow struct {
	name, format, size, what string
}

// appendRows adds a node and all that stands on it; indent is what is drawn to the left
// of the node's branch.
func appendRows(rows []treeRow, n TreeNode, indent string, last bool) []treeRow {
	branch, below := "├─ ", "│  "
	if last {
		branch, below = "└─ ", "   "
	}
	rows = append(rows, treeRow{
		name: indent + branch + shortFile(n.File), format: n.Format, size: humanBytes(n.AllocatedBytes), what: n.what(),
	})
	for i, child := range n.Children {
		rows = appendRows(rows, child, indent+below, i == len(n.Children)-1)
	}
	return rows
}

// shortFile leaves out the directory that all volumes lie in.
func shortFile(file string) string { return strings.TrimPrefix(file, volumesDir+"/") }

// what says what a layer is for.
func (n TreeNode) what() string {
	var parts []string
	if n.Missing {
		parts = append(parts, "! missing")
	}
	if path.Dir(n.File) == imagesDir || ownerOf(n.File) == "" {
		parts = append(parts, "image")
	}
	for _, s := range n.Snapshots {
		parts = append(parts, "◆ "+s.ID)
	}
	for _, v := range n.Volumes {
		text := fmt.Sprintf("● %s %s", v.Name, humanBytes(v.SizeBytes))
		if len(v.Nodes) > 0 {
			text += " on " + strings.Join(v.Nodes, ", ")
		}
		parts = append(parts, text)
	}
	return strings.Join(parts, "  ")
}

// humanBytes writes a size with three digits at most: "1.2 MiB".
func humanBytes(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, u := float64(n), 0
	for v >= 1000 && u < len(units)-1 {
		v /= 1024
		u++
	}
	if v < 10 && u > 0 && v != float64(int64(v)) {
		return fmt.Sprintf("%.1f %s", v, units[u])
	}
	return fmt.Sprintf("%.0f %s", v, units[u])
}
