package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/confine"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// serverOptions say what a volume's server process serves: an image, or a volume.
type serverOptions struct {
	control  string
	run      runDir
	readOnly bool

	image string
	access

	store  string // NAME=PATH
	volume string
	node   string
	epoch  int64

	rings bool // it has io_uring instances, and is going to need them
}

// imageServer returns the arguments of a server of an image.
func imageServer(path string, how access, run runDir, readOnly bool) []string {
	return []string{"server", "--run-dir", string(run), "--image", path, "--format", how.format, "--root", how.root,
		"--secret-file", how.secretFile, "--read-only=" + strconv.FormatBool(readOnly)}
}

func newServerCommand() *cobra.Command {
	var opts serverOptions
	cmd := &cobra.Command{
		Use:    "server",
		Short:  "Serve one volume, as its supervisor says",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (opts.image == "") == (opts.store == "") {
				return errors.New("either --image or --store and --volume is needed")
			}
			letWorkersWait()
			slog.SetDefault(logger().With("volume", opts.volumeID()))
			// RunServer obeys signals itself: not while the device is in use.
			ctx := context.WithoutCancel(cmd.Context())
			protocols, rings, err := supervisor.ConfinedProtocols()
			if err != nil {
				return err
			}
			opts.rings = rings
			return supervisor.RunServer(ctx, supervisor.ServerConfig{
				Control: opts.control, Version: version, Open: opts.open, Protocols: protocols,
			})
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.control, "control", "", "control socket")
	addRunDirFlag(cmd, &opts.run)
	flags.BoolVar(&opts.readOnly, "read-only", false, "open for reading")
	flags.StringVar(&opts.image, "image", "", "image to serve")
	opts.addFormatFlag(cmd, "format", "", "the image's format")
	opts.addRootFlag(cmd)
	opts.addSecretFlag(cmd, "secret-file")
	flags.StringVar(&opts.store, "store", "", "NAME=PATH of the store that holds the volume")
	flags.StringVar(&opts.volume, "volume", "", "volume to serve")
	flags.StringVar(&opts.node, "node", "", "node that the volume is published to")
	flags.Int64Var(&opts.epoch, "epoch", 0, "epoch of the publication")
	return cmd
}

// volumeID is what the supervisor calls the volume, except for one that stands for an image.
func (o *serverOptions) volumeID() string {
	if o.image != "" {
		return imageID + o.image
	}
	name, _, _ := strings.Cut(o.store, "=")
	return name + "/" + o.volume
}

func (o *serverOptions) open(ctx context.Context) (supervisor.Opened, error) {
	if o.image != "" {
		return o.openImage(ctx)
	}
	return o.openVolume(ctx)
}

func (o *serverOptions) openImage(ctx context.Context) (supervisor.Opened, error) {
	at, err := locate(o.image, o.root)
	if err != nil {
		return supervisor.Opened{}, err
	}
	at.close()
	rules := confine.Rules{Read: []string{at.root}, Write: []string{filepath.Dir(at.path())}}
	var journal string
	if !o.readOnly {
		if journal, err = o.run.journalDir(at.path()); err != nil {
			return supervisor.Opened{}, err
		}
	}
	if err := o.confine(rules, journal); err != nil {
		dropJournalDir(journal)
		return supervisor.Opened{}, err
	}
	var img *openedImage
	if o.readOnly {
		img, err = o.access.open(ctx, o.image, vfs.ReadOnly)
	} else {
		img, err = o.openJournalled(ctx, o.image, journal)
	}
	if err != nil {
		return supervisor.Opened{}, err
	}
	return supervisor.Opened{
		Device: closing{img, img.close},
		Stats:  func() any { return img.Stats() },
		Image:  func() supervisor.ImageStats { return imageStats(img) },
	}, nil
}

func (o *serverOptions) openVolume(ctx context.Context) (supervisor.Opened, error) {
	s, err := openStore(ctx, o.store, store.Options{})
	if err != nil {
		return supervisor.Opened{}, err
	}
	opts := store.AttachOptions{Node: o.node, Epoch: o.epoch, ReadOnly: o.readOnly}
	var journal string
	if !o.readOnly {
		if journal, err = o.run.journalDir(s.ID() + "/" + o.volume); err != nil {
			return supervisor.Opened{}, errors.Join(err, s.Close())
		}
		opts.Journal = filepath.Join(journal, journalName)
	}
	var volume *store.Attached
	if err = o.confineToVolume(s, journal); err == nil {
		volume, err = s.Attach(ctx, o.volume, opts)
	}
	if err != nil {
		dropJournalDir(journal)
		return supervisor.Opened{}, errors.Join(err, s.Close())
	}
	return supervisor.Opened{
		Device: closing{volume.Device(), func() error {
			defer dropJournalDir(journal)
			return errors.Join(volume.Close(), s.Close())
		}},
		Lost:  volume.Lost(),
		Stats: func() any { return volume.Stats() },
		Image: func() supervisor.ImageStats { return imageStats(volume) },
		Limits: func() filter.Limits {
			l := volume.Record().Limits
			return filter.Limits{IOPS: l.IOPS, BytesPerSecond: l.BytesPerSecond}
		},
	}, nil
}

// imageStats is what metrics show of an image.
func imageStats(img interface {
	Stats() engine.Stats
	AllocatedBytes() (int64, error)
}) supervisor.ImageStats {
	stats := img.Stats()
	allocated, err := img.AllocatedBytes()
	if err != nil {
		allocated = 0 // it is being closed, or its store has no answer
	}
	return supervisor.ImageStats{
		TableHits: stats.TableHits, TableMisses: stats.TableMisses,
		AllocatedBytes: allocated, Layers: stats.Layers,
	}
}

func (o *serverOptions) confineToVolume(s *openedStore, journal string) error {
	reach, err := s.Reach(o.volume)
	if err != nil {
		return err
	}
	return o.confine(confine.Rules{
		Read:  s.hostPaths(reach.Read),
		List:  s.hostPaths(reach.List),
		Write: s.hostPaths(reach.Write),
	}, journal)
}

// confine takes from this process, before it looks at any image, what serving does not
// take: besides what rules say it reaches its redo journal, the directory of its control
// socket, and what the runtime reads about the process itself.
func (o *serverOptions) confine(rules confine.Rules, journal string) error {
	rules.Write = append(rules.Write, filepath.Dir(o.control))
	rules.Rings = o.rings
	rules.Read = append(rules.Read, "/proc/self", "/etc/localtime", "/usr/share/zoneinfo")
	if o.secretFile != "" {
		rules.Read = append(rules.Read, o.secretFile)
	}
	if journal != "" {
		rules.Write = append(rules.Write, journal)
		rules.Remove = append(rules.Remove, o.run.redo())
	}
	applied, err := confine.Process(rules)
	switch {
	case errors.Is(err, confine.ErrUnsupported):
		slog.Warn("the server has all of its rights", "because", err)
	case err != nil:
		return err
	default:
		slog.Info("confined", "by", applied.String())
	}
	return nil
}

// closing is a device whose Close does more than the device's own.
type closing struct {
	block.Device
	close func() error
}

// Close makes everything durable and releases the device and what holds it.
func (c closing) Close() error { return c.close() }

// namedStore is a store given as NAME=PATH.
type namedStore struct{ name, path string }

// openedStore is an open store and the directory it lies in.
type openedStore struct {
	*store.Store
	dir  io.Closer
	path string
}

// hostPaths returns the paths of names in the store.
func (s *openedStore) hostPaths(names []string) (paths []string) {
	for _, name := range names {
		paths = append(paths, filepath.Join(s.path, filepath.FromSlash(name)))
	}
	return paths
}

func (s *openedStore) Close() error { return errors.Join(s.Store.Close(), s.dir.Close()) }

// openStore opens a store given as NAME=PATH.
func openStore(ctx context.Context, flag string, opts store.Options) (*openedStore, error) {
	named, err := parseStore(flag)
	if err != nil {
		return nil, err
	}
	return named.open(ctx, opts)
}

func (n namedStore) open(ctx context.Context, opts store.Options) (*openedStore, error) {
	dir, err := vfs.OpenDir(n.path)
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", n.name, err)
	}
	s, err := store.Open(ctx, n.name, dir, opts)
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return &openedStore{s, dir, n.path}, nil
}
