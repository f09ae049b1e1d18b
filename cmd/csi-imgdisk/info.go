package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// imageInfo has the fields of `qemu-img info --output=json`.
type imageInfo struct {
	VirtualSize           int64            `json:"virtual-size"`
	Filename              string           `json:"filename"`
	ClusterSize           int64            `json:"cluster-size,omitempty"`
	Format                string           `json:"format"`
	ActualSize            int64            `json:"actual-size"`
	Encrypted             bool             `json:"encrypted,omitempty"`
	Compressed            bool             `json:"compressed,omitempty"`
	Snapshots             []map[string]any `json:"snapshots,omitempty"`
	FormatSpecific        *formatSpecific  `json:"format-specific,omitempty"`
	BackingFilename       string           `json:"backing-filename,omitempty"`
	FullBackingFilename   string           `json:"full-backing-filename,omitempty"`
	BackingFilenameFormat string           `json:"backing-filename-format,omitempty"`
	BackingProblem        string           `json:"backing-problem,omitempty"` // not qemu-img's
	DirtyFlag             bool             `json:"dirty-flag"`

	subformat string
	details   []engine.Detail
}

type formatSpecific struct {
	Type string         `json:"type"`
	Data map[string]any `json:"data"`
}

// Details that qemu-img shows beside the other facts, not as the format's own.
const (
	dirtyDetail      = "dirty-flag"
	encryptedDetail  = "encrypted"
	compressedDetail = "compressed"
	snapshotsDetail  = "snapshots"
)

func newInfoCommand() *cobra.Command {
	var how access
	var chain bool
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Show what an image says about itself",
		Long: `Shows what an image says about itself. It takes no locks: an image that is being written
can be looked at. With -o json the fields are those of qemu-img info.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			infos, err := describeChain(cmd.Context(), how, args[0], chain)
			if err != nil {
				return err
			}
			var result any = infos
			if !chain {
				result = infos[0]
			}
			return emit(cmd, result, func(p *printer) {
				for i, info := range infos {
					if i > 0 {
						p.line("")
					}
					info.print(p)
				}
			})
		},
	}
	how.addRootFlag(cmd)
	how.addChainFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "show what it stands on, too")
	return cmd
}

// describeChain describes an image, and the ones below it if they are asked for. Each is
// opened alone, so that an image whose parent is missing can be looked at.
func describeChain(ctx context.Context, how access, path string, chain bool) ([]imageInfo, error) {
	opts := how.options(vfs.ReadOnly)
	opts.NoLock, opts.NoParents, opts.Secret = true, !chain, how.anySecret()
	img, err := how.openWith(ctx, path, opts)
	if err != nil {
		return nil, err
	}
	defer img.release()
	var infos []imageInfo
	for _, layer := range img.Layers() {
		info, err := describe(img, layer, path)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func describe(img *openedImage, layer *engine.Layer, named string) (imageInfo, error) {
	geometry, description := layer.Codec.Geometry(), layer.Codec.Describe()
	info := imageInfo{
		VirtualSize: geometry.SizeBytes,
		Filename:    img.hostPath(named, layer.Name),
		ClusterSize: geometry.ClusterBytes,
		Format:      layer.Format,
		subformat:   description.Subformat,
		details:     description.Details,
	}
	for _, f := range layer.Files {
		n, err := f.AllocatedBytes()
		if err != nil {
			return imageInfo{}, err
		}
		info.ActualSize += n
	}
	switch parent := layer.Parent; {
	case parent == nil:
	case parent.Broken != nil:
		info.BackingProblem = sentence(parent.Broken)
	default:
		info.BackingFilename = vfs.RelativeLink(layer.Name, parent.Name)
		info.FullBackingFilename = img.hostPath(named, parent.Name)
		info.BackingFilenameFormat = parent.Format
	}
	info.setDetails()
	return info, nil
}

func (i *imageInfo) setDetails() {
	data := map[string]any{}
	for _, d := range i.details {
		switch d.Name {
		case dirtyDetail:
			i.DirtyFlag, _ = d.Value.(bool)
		case encryptedDetail:
			i.Encrypted, _ = d.Value.(bool)
		case compressedDetail:
			i.Compressed, _ = d.Value.(bool)
		case snapshotsDetail:
			i.Snapshots, _ = d.Value.([]map[string]any)
		default:
			data[d.Name] = d.Value
		}
	}
	if len(data) > 0 {
		i.FormatSpecific = &formatSpecific{Type: i.Format, Data: data}
	}
}

func (i *imageInfo) print(p *printer) {
	field := func(name, format string, args ...any) {
		p.line("%-14s %s", name+":", fmt.Sprintf(format, args...))
	}
	format := i.Format
	if i.subformat != "" {
		format += " (" + i.subformat + ")"
	}
	field("image", "%s", i.Filename)
	field("format", "%s", format)
	field("virtual size", "%s (%d bytes)", humanSize(i.VirtualSize), i.VirtualSize)
	field("disk size", "%s", humanSize(i.ActualSize))
	if i.ClusterSize > 0 {
		field("cluster size", "%s", humanSize(i.ClusterSize))
	}
	if i.BackingFilename != "" {
		field("stands on", "%s", i.BackingFilename)
	}
	if i.BackingProblem != "" {
		field("stands on", "a link that cannot be followed: %s", i.BackingProblem)
	}
	for _, d := range i.details {
		printDetail(p, "", d.Name, d.Value)
	}
}

// printDetail prints one of the format's own facts; lists become paragraphs.
func printDetail(p *printer, indent, name string, value any) {
	list, ok := value.([]map[string]any)
	label := indent + strings.ReplaceAll(name, "-", " ") + ":"
	if !ok {
		p.line("%-14s %v", label, value)
		return
	}
	p.line("%s", label)
	for _, entry := range list {
		var fields []string
		for _, key := range sortedKeys(entry) {
			fields = append(fields, fmt.Sprintf("%s %v", strings.ReplaceAll(key, "-", " "), entry[key]))
		}
		p.line("%s  %s", indent, strings.Join(fields, ", "))
	}
}
