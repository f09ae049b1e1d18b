package main

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

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
	secretFile    string
}

func (s *shape) addFlags(cmd *cobra.Command, formatShort string) {
	s.addLayoutFlags(cmd, formatShort)
	cmd.Flags().StringVar(&s.preallocation, "preallocation", "", "space taken at once: off, metadata, falloc or full, as far as the format has them")
	secretFlag := "secret-file"
	if cmd.Flags().Lookup(secretFlag) != nil {
		secretFlag = "target-secret-file"
	}
	cmd.Flags().StringVar(&s.secretFile, secretFlag, "", "file with the password that a new, encrypted image gets")
}

// addLayoutFlags adds what decides how much space an image takes.
func (s *shape) addLayoutFlags(cmd *cobra.Command, formatShort string) {
	flags := cmd.Flags()
	formatFlag := "format"
	if flags.Lookup(formatFlag) != nil {
		formatFlag = "target-format"
	}
	flags.StringVarP(&s.format, formatFlag, formatShort, "", "the new image's format; by default what its name ends with")
	flags.StringVar(&s.subformat, "subformat", "", "variant of the format, such as monolithicFlat")
	flags.Var(&s.clusterSize, "cluster-size", "unit of allocation, such as 64K")
	flags.StringArrayVar(&s.extra, "option", nil, "another option of the format, as NAME=VALUE")
}

// resolve returns the format of a new image called name.
func (s *shape) resolve(name string) (formats.Format, error) {
	if s.format != "" {
		return formats.Lookup(s.format)
	}
	ending := strings.ToLower(strings.TrimPrefix(path.Ext(name), "."))
	format, err := formats.Lookup(ending)
	if err != nil {
		return nil, fmt.Errorf("the name %s does not say a format: give one of %s", name, strings.Join(formats.Names(), ", "))
	}
	return format, nil
}

// request returns the request to create an image at a location. A size is rounded up to
// what the format can have.
func (s *shape) request(at *location, format formats.Format, sizeBytes int64) (formats.CreateRequest, error) {
	req := formats.CreateRequest{
		FS: at.fs, Name: at.name, SizeBytes: sizeBytes,
		Subformat: s.subformat, ClusterBytes: int64(s.clusterSize),
		Preallocation: formats.Preallocation(s.preallocation),
		Secret:        secretFrom(s.secretFile),
	}
	req.SizeBytes = formats.RoundSize(format, sizeBytes)
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
	var on parentFlags
	var root string
	cmd := &cobra.Command{
		Use:   "create FILE [SIZE]",
		Short: "Make a new, empty image, or an overlay on another one",
		Long: `Makes a new image whose contents are zeroes. With --parent it is an overlay: its contents
are the parent's, which must not change from now on, and SIZE is optional. The parent may be
of another format where the overlay's can say so (QCOW2). What is there already is not
overwritten.

` + formatsHelp(),
		Example: `  csi-imgdisk image create disk.vmdk 10Gi
  csi-imgdisk image create --parent base.vmdk overlay.vmdk
  csi-imgdisk image create -f vmdk --subformat twoGbMaxExtentSparse --option adapter_type=lsilogic disk.vmdk 10Gi`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			var size int64
			if len(args) == 2 {
				var err error
				if size, err = driver.ParseSize(args[1]); err != nil {
					return err
				}
			} else if on.path == "" {
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
			if err := create(cmd.Context(), at, format, req, on); err != nil {
				return at.explain(err)
			}
			return reportCreated(cmd, args[0], access{root: root, format: format.Name()})
		},
	}
	s.addFlags(cmd, "f")
	on.addFlags(cmd, "b", "image to stand on")
	cmd.Flags().StringVar(&root, "root", "", "directory in which the image and its parent must lie; by default its store's, or its own")
	return cmd
}

// parentFlags name what an image is to stand on.
type parentFlags struct {
	path, format, secretFile string
}

func (f *parentFlags) addFlags(cmd *cobra.Command, short, usage string) {
	cmd.Flags().StringVarP(&f.path, "parent", short, "", usage)
	cmd.Flags().StringVarP(&f.format, "parent-format", "F", "", "the parent's format; found out from its contents if not given")
	cmd.Flags().StringVar(&f.secretFile, "parent-secret-file", "", "file with the password of an encrypted parent")
	// What qemu-img's users call them.
	cmd.Flags().StringVar(&f.path, "backing", "", usage)
	cmd.Flags().StringVar(&f.format, "backing-format", "", "")
	for _, name := range []string{"backing", "backing-format"} {
		_ = cmd.Flags().MarkHidden(name) // it is there
	}
}

// name returns the parent's name in a tree.
func (f *parentFlags) name(at *location) (string, error) {
	real, err := realPath(f.path)
	if err != nil {
		return "", err
	}
	name, err := filepath.Rel(at.root, real)
	if err != nil || vfs.CheckName(filepath.ToSlash(name)) != nil {
		return "", fmt.Errorf("the parent %s does not lie in %s: --root DIR names a directory that holds both images", f.path, at.root)
	}
	return filepath.ToSlash(name), nil
}

// open opens the parent with all it stands on.
func (f *parentFlags) open(ctx context.Context, at *location) (*formats.Parent, *formats.Image, error) {
	name, err := f.name(at)
	if err != nil {
		return nil, nil, err
	}
	img, err := formats.Open(ctx, at.fs, name, formats.OpenOptions{
		Format: f.format, Mode: vfs.ReadOnly, Secret: secretFrom(f.secretFile),
	})
	if err != nil {
		return nil, nil, err
	}
	return &formats.Parent{Name: name, Layer: img.Layers()[0]}, img, nil
}

func create(ctx context.Context, at *location, format formats.Format, req formats.CreateRequest, on parentFlags) error {
	if on.path == "" {
		return format.Create(ctx, req)
	}
	parent, img, err := on.open(ctx, at)
	if err != nil {
		return err
	}
	defer func() { _ = img.Close() }() // it was only read
	req.Parent = parent
	return format.Create(ctx, req)
}

// formatsHelp lists what can be made.
func formatsHelp() string {
	var b strings.Builder
	b.WriteString("Formats and their options:\n")
	for _, f := range formats.All() {
		o := f.Options()
		fmt.Fprintf(&b, "  %s", f.Name())
		if len(o.Subformats) > 0 {
			fmt.Fprintf(&b, "; --subformat %s", strings.Join(o.Subformats, ", "))
		}
		if len(o.ParentFormats) > 0 {
			fmt.Fprintf(&b, "; stands on %s", strings.Join(o.ParentFormats, ", "))
		}
		b.WriteString("\n")
		for _, extra := range o.Extra {
			values := ""
			if len(extra.Values) > 0 {
				values = " (" + strings.Join(extra.Values, ", ") + ")"
			}
			fmt.Fprintf(&b, "    --option %s=…: %s%s\n", extra.Name, extra.Help, values)
		}
	}
	return strings.TrimSuffix(b.String(), "\n")
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
