package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// conversion is what `image convert` reports.
type conversion struct {
	Source      string  `json:"source"`
	Filename    string  `json:"filename"`
	Format      string  `json:"format"`
	VirtualSize int64   `json:"virtual-size"`
	ActualSize  int64   `json:"actual-size"`
	Seconds     float64 `json:"seconds"`
}

// conversionPlan is what the command line asks for.
type conversionPlan struct {
	how          access
	shape        shape
	on           parentFlags
	target, root string
	compress     bool
	force        bool
}

func newConvertCommand() *cobra.Command {
	var plan conversionPlan
	var flatten bool
	cmd := &cobra.Command{
		Use:   "convert SOURCE TARGET",
		Short: "Copy an image, with all it stands on, into a new image of another format",
		Long: `Copies what the guest sees of an image, parents included, into a new one that stands on
nothing. With --parent the new image is an overlay on the image named there, and holds only
what differs from it, which is found out by reading both.

Holes, and zeroes in units of the target's clusters, take no space in the target, unless
--preallocation says otherwise. Compression (--compress; always for streamOptimized) uses all
processors.

The target gets its name when it is complete and durable. Until then its files are called
.NAME.RANDOM.partial; they are removed if the work fails or is interrupted. A target that
exists is only replaced with --force, and not while somebody uses it.`,
		Example: `  csi-imgdisk image convert export.vmdk disk.qcow2
  csi-imgdisk image convert --subformat streamOptimized disk.qcow2 export.vmdk
  csi-imgdisk image convert -B base.qcow2 disk.vmdk overlay.qcow2`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if flatten && plan.on.path != "" {
				return errors.New("--from-chain makes an image that stands on nothing: leave --parent out")
			}
			plan.target = args[1]
			result, err := plan.run(cmd, args[0])
			if err != nil {
				return err
			}
			return emit(cmd, result, func(p *printer) {
				p.line("%s: %s, %s, takes %s, made in %.1f s", result.Filename, result.Format,
					humanSize(result.VirtualSize), humanSize(result.ActualSize), result.Seconds)
			})
		},
	}
	plan.how.addRootFlag(cmd)
	plan.how.addChainFlag(cmd)
	plan.how.addFormatFlag(cmd, "source-format", "f", "the source's format; found out from its contents if not given")
	plan.how.addSecretFlag(cmd, "secret-file")
	flags := cmd.Flags()
	flags.BoolVarP(&plan.how.forceShare, "force-share", "U", false, "do not mind that somebody else writes the source: the copy may be inconsistent")
	flags.StringVar(&plan.root, "target-root", "", "directory in which the target must lie; by default its store's, or its own")
	plan.shape.addFlags(cmd, "O")
	plan.on.addFlags(cmd, "B", "let the target stand on this image, which lies in the target's tree")
	flags.BoolVarP(&plan.compress, "compress", "c", false, "store data compressed, where the format can")
	flags.BoolVar(&plan.force, "force", false, "replace a target that exists")
	flags.BoolVar(&flatten, "from-chain", false, "copy what the source stands on, too: what is done anyhow without --parent")
	addProgressFlag(cmd)
	return cmd
}

func (c *conversionPlan) run(cmd *cobra.Command, source string) (conversion, error) {
	ctx, start := cmd.Context(), time.Now()
	src, err := c.how.open(ctx, source, vfs.ReadOnly)
	if err != nil {
		return conversion{}, err
	}
	defer src.release()
	at, err := locate(c.target, c.root)
	if err != nil {
		return conversion{}, err
	}
	defer at.close()
	format, err := c.shape.resolve(at.name)
	if err != nil {
		return conversion{}, err
	}
	if err := c.make(cmd, src, at, format); err != nil {
		return conversion{}, at.explain(err)
	}
	infos, err := describeChain(ctx, access{root: c.root, format: format.Name()}, c.target, false)
	if err != nil {
		return conversion{}, err
	}
	return conversion{
		Source: source, Filename: c.target, Format: format.Name(),
		VirtualSize: infos[0].VirtualSize, ActualSize: infos[0].ActualSize,
		Seconds: time.Since(start).Seconds(),
	}, nil
}

// make makes the target under temporary names, and gives it its name.
func (c *conversionPlan) make(cmd *cobra.Command, src *openedImage, at *location, format formats.Format) error {
	req, err := c.shape.request(at, format, 0)
	if err != nil {
		return err
	}
	staging := formats.NewStaging(at.fs, c.force)
	req.FS = staging
	work := formats.Conversion{Copying: formats.Copying{Compress: c.compress}}
	if c.on.path != "" {
		closeParent, err := c.standOn(cmd.Context(), at, &req, &work)
		if err != nil {
			return err
		}
		defer closeParent()
	}
	progress, end := startProgress(cmd, "converting", inBytes)
	err = work.Convert(cmd.Context(), src, format, req, progress)
	end()
	if err == nil {
		err = cmd.Context().Err() // whoever interrupts it at the last moment wants no target
	}
	if err == nil {
		err = staging.Publish(at.name)
	}
	if errors.Is(err, context.Canceled) {
		err = fmt.Errorf("interrupted: nothing is left of %s", c.target)
	}
	return errors.Join(err, staging.Discard())
}

// standOn has the target made on the parent that the command line names.
func (c *conversionPlan) standOn(ctx context.Context, at *location, req *formats.CreateRequest, work *formats.Conversion) (closeParent func(), err error) {
	parent, img, err := c.on.open(ctx, at)
	if err != nil {
		return nil, err
	}
	req.Parent, work.Under = parent, img
	work.ParentFormats = map[string]string{}
	for _, layer := range img.Layers() {
		work.ParentFormats[layer.Name] = layer.Format
	}
	return func() { _ = img.Close() }, nil // it was only read
}
