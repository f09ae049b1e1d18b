package main

import (
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// mapEntry has the fields of `qemu-img map --output=json`.
type mapEntry struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`
	Present    bool   `json:"present"` // some layer says what the bytes are
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed,omitempty"`
	Offset     *int64 `json:"offset,omitempty"`
	File       string `json:"filename,omitempty"`
}

func newMapCommand() *cobra.Command {
	var how access
	cmd := &cobra.Command{
		Use:   "map FILE",
		Short: "Show which parts of an image hold data, in which layer and file",
		Long: `Shows which guest bytes hold data, in which layer (0 is the image itself) and where in
which file. With -o json the fields are those of qemu-img map, and runs without data are
listed, too.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts := how.options(vfs.ReadOnly)
			opts.Secret = how.anySecret()
			img, err := how.openWith(cmd.Context(), args[0], opts)
			if err != nil {
				return err
			}
			defer img.release()
			entries, err := mapImage(img, args[0])
			if err != nil {
				return err
			}
			return emit(cmd, entries, func(p *printer) { printMap(p, entries) })
		},
	}
	how.addFlags(cmd)
	how.addChainFlag(cmd)
	return cmd
}

// mapImage lists an image's extents, with neighbours of one kind joined.
func mapImage(img *openedImage, named string) ([]mapEntry, error) {
	entries := []mapEntry{}
	bottom := len(img.Layers()) - 1
	size := img.Info().SizeBytes
	for off := int64(0); off < size; {
		extent, err := img.Map(off, size-off)
		if err != nil {
			return nil, fmt.Errorf("map guest offset %d: %w", off, err)
		}
		entry := newMapEntry(extent, bottom)
		if extent.File != "" {
			entry.File = img.hostPath(named, extent.File)
		}
		if last := len(entries) - 1; last >= 0 && entries[last].continues(entry) {
			entries[last].Length += entry.Length
		} else {
			entries = append(entries, entry)
		}
		off += extent.Len
	}
	return entries, nil
}

func newMapEntry(extent block.Extent, bottom int) mapEntry {
	entry := mapEntry{
		Start: extent.Off, Length: extent.Len,
		Depth:      extent.Depth,
		Present:    extent.State != block.Unallocated,
		Zero:       extent.State != block.Data,
		Data:       extent.State == block.Data,
		Compressed: extent.Compressed,
	}
	if !entry.Present {
		entry.Depth = bottom // where the search ended
	}
	if extent.File != "" && extent.FileOff >= 0 {
		entry.Offset = &extent.FileOff
	}
	return entry
}

// continues reports whether next goes on where e ends, in every respect.
func (e mapEntry) continues(next mapEntry) bool {
	if e.Depth != next.Depth || e.Present != next.Present || e.Zero != next.Zero ||
		e.Data != next.Data || e.Compressed != next.Compressed || e.File != next.File {
		return false
	}
	if e.Offset == nil || next.Offset == nil {
		return e.Offset == next.Offset
	}
	return *e.Offset+e.Length == *next.Offset
}

func printMap(p *printer, entries []mapEntry) {
	var rows [][]string
	for _, e := range entries {
		if !e.Data {
			continue
		}
		at := "compressed"
		if e.Offset != nil {
			at = fmt.Sprintf("%#x", *e.Offset)
		}
		rows = append(rows, []string{fmt.Sprintf("%#x", e.Start), fmt.Sprintf("%#x", e.Length), fmt.Sprint(e.Depth), at, e.File})
	}
	p.table([]string{"OFFSET", "LENGTH", "LAYER", "MAPPED TO", "FILE"}, rows)
}

func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }
