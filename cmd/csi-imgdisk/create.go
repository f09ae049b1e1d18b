package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// shape is how a new image is to be laid out.
type shape struct {
	format        string
	subformat     string
	clusterSize   sizeValue
	preallocation string
	extra         []string
}

func (s *shape) addFlags(cmd *cobra.Command, formatFlag, short string) {
	flags := cmd.Flags()
	flags.StringVarP(&s.format, formatFlag, short, "", "the new image's format; by default what its name ends with")
	flags.StringVar(&s.subformat, "subformat", "", "variant of the format, such as monolithicFlat")
	flags.Var(&s.clusterSize, "cluster-size", "unit of allocation, such as 64K")
	flags.StringVar(&s.preallocation, "preallocation", "", "space taken at once: off, metadata, falloc or full, as far as the format has them")
	flags.StringArrayVarP(&s.extra, "option", "O", nil, "another option of the format, as NAME=VALUE")
}

// resolve returns the format of a new image called name.
func (s *shape) resolve(name string) (formats.Format, error) {
	if s.format != "" {
		return formats.Lookup(s.format)
	}
	ending := strings.ToLower(strings.TrimPrefix(path.Ext(name), "."))
	if ending == "img" {
		ending = "raw"
	}
	format, err := formats.Lookup(ending)
	if err != nil {
		return nil, fmt.Errorf("the name %s does not say a format: give one of %s", name, strings.Join(formatNames(), ", "))
	}
	return format, nil
}

func formatNames() []string {
	var names []string
	for _, f := range formats.All() {
		names = append(names, f.Name())
	}
	return names
}

// request returns the request to create an image at a location. A size is rounded up to
// what the format can have.
func (s *shape) request(at *location, format formats.Format, sizeBytes int64) (formats.CreateRequest, error) {
	req := formats.CreateRequest{
		FS: at.fs, Name: at.name, SizeBytes: sizeBytes,
		Subformat: s.subformat, ClusterBytes: int64(s.clusterSize),
		Preallocation: formats.Preallocation(s.preallocation),
	}
	if m := format.Options().SizeMultiple; m > 1 && sizeBytes%m != 0 {
		req.SizeBytes += m - sizeBytes%m
	}
	for _, option := range s.extra {
		name, value, ok := strings.Cut(option, "=")
		if !ok {
			return req, fmt.Errorf("option %q: want NAME=VALUE", option)
		}
		if req.Extra == nil {
			req.Extra = map[string]string{}
		}
		req.Extra[name] = value
	}
	return req, nil
}

func newCreateCommand() *cobra.Command {
	var s shape
	var root, parent, parentFormat string
	cmd := &cobra.Command{
		Use:   "create FILE [SIZE]",
		Short: "Make a new, empty image, or an overlay on another one",
		Long: `Makes a new image whose contents are zeroes. With --parent it is an overlay: its contents
are the parent's, which must not change from now on, and SIZE is optional.`,
		Example: `  csi-imgdisk image create disk.vmdk 10Gi
  csi-imgdisk image create --parent base.vmdk overlay.vmdk`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var size int64
			if len(args) == 2 {
				var err error
				if size, err = driver.ParseSize(args[1]); err != nil {
					return err
				}
			} else if parent == "" {
				return errors.New("a size is needed, as in: csi-imgdisk image create disk.vmdk 10Gi")
			}
			at, err := locate(args[0], root)
			if err != nil {
				return err
			}
			defer at.close()
			format, err := s.resolve(at.name)
			if err != nil {
				return err
			}
			req, err := s.request(at, format, size)
			if err != nil {
				return err
			}
			if err := create(cmd.Context(), at, format, req, parent, parentFormat); err != nil {
				return at.explain(err)
			}
			return reportCreated(cmd, args[0], access{root: root, format: format.Name()})
		},
	}
	s.addFlags(cmd, "format", "f")
	cmd.Flags().StringVar(&root, "root", "", "directory in which the image and its parent must lie; by default its store's, or its own")
	cmd.Flags().StringVar(&parent, "parent", "", "image to stand on")
	cmd.Flags().StringVar(&parentFormat, "parent-format", "", "the parent's format; found out from its contents if not given")
	return cmd
}

func create(ctx context.Context, at *location, format formats.Format, req formats.CreateRequest, parent, parentFormat string) error {
	if parent == "" {
		return format.Create(ctx, req)
	}
	real, err := realPath(parent)
	if err != nil {
		return err
	}
	name, err := filepath.Rel(at.root, real)
	if err != nil || vfs.CheckName(filepath.ToSlash(name)) != nil {
		return fmt.Errorf("the parent %s does not lie in %s: --root DIR names a directory that holds both images", parent, at.root)
	}
	img, err := formats.Open(ctx, at.fs, filepath.ToSlash(name), formats.OpenOptions{Format: parentFormat, Mode: vfs.ReadOnly})
	if err != nil {
		return err
	}
	defer func() { _ = img.Close() }() // it was only read
	if size := img.Info().SizeBytes; req.SizeBytes != 0 && req.SizeBytes < size {
		return fmt.Errorf("size %d: %w: the parent has %d bytes, an overlay cannot have fewer", req.SizeBytes, block.ErrInvalid, size)
	}
	req.Parent = &formats.Parent{Name: filepath.ToSlash(name), Layer: img.Layers()[0]}
	return format.Create(ctx, req)
}

// reportCreated shows a new image.
func reportCreated(cmd *cobra.Command, path string, how access) error {
	infos, err := describeChain(cmd.Context(), how, path, false)
	if err != nil {
		return err
	}
	return emit(cmd, infos[0], func(p *printer) {
		p.line("%s: %s, %s", path, infos[0].Format, humanSize(infos[0].VirtualSize))
	})
}
