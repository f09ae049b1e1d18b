package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// drainPatience is how long requests may take that a client has sent when the server is
// to end.
const drainPatience = 30 * time.Second

type serveOptions struct {
	access
	run        runDir
	listen     listenOptions
	exports    []string // NAME=FILE
	formats    []string // NAME=FORMAT
	maxClients int
	readOnly   bool
}

func newServeCommand() *cobra.Command {
	var opts serveOptions
	cmd := &cobra.Command{
		Use:   "serve [FILE] [--export NAME=FILE]... --socket PATH",
		Short: "Serve images over NBD",
		Long: `Serves images to NBD clients (qemu-img, nbdcopy, fio, nbd-client) on a unix socket, which
only the same user can reach, and on a TCP address if one is asked for, until it gets
SIGTERM or SIGINT; then it answers what it was sent, makes everything durable and closes
the images. FILE is the export without a name, or any if it is the only one; others are
chosen by name.

A writable image has a redo journal in the run directory: if this process is killed, every
write it had answered is there again when the image is served, or attached, the next time.

Give --format raw for a raw disk: a guest can write another format's header into it.

TLS is offered or required with a directory of certificates, in PEM, under the names that
qemu-nbd and nbdkit use: server-cert.pem and server-key.pem; and, to verify clients by
certificates of their own, ca-cert.pem and, if there is one, ca-crl.pem. On TCP without
TLS, everybody who reaches the address reads and writes the images.`,
		Example: `  csi-imgdisk serve disk.vmdk --socket /run/disk.sock &
  qemu-img info nbd+unix:///?socket=/run/disk.sock

  csi-imgdisk serve --export a=a.vhdx --export b=b.qcow2 --socket /run/disks.sock &
  nbdcopy nbd+unix:///b?socket=/run/disks.sock b.raw

  csi-imgdisk serve disk.vmdk --read-only --address :10809 --tls-certificates /etc/pki/disks`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sources, err := opts.sources(args)
			if err != nil {
				return err
			}
			return serve(cmd, sources, opts)
		},
	}
	opts.addRootFlag(cmd)
	opts.addFormatFlag(cmd, "format", "f", "the images' format; found out from their contents if not given")
	opts.addSecretFlag(cmd, "secret-file")
	addRunDirFlag(cmd, &opts.run)
	flags := cmd.Flags()
	flags.StringArrayVar(&opts.exports, "export", nil, "NAME=FILE: serve another image, by a name; may be repeated")
	flags.StringArrayVar(&opts.formats, "export-format", nil, "NAME=FORMAT: the format of the image served by that name; may be repeated")
	flags.BoolVarP(&opts.readOnly, "read-only", "r", false, "refuse writes")
	flags.IntVar(&opts.maxClients, "max-clients", 64, "how many clients are served at the same time; each may take 64 MiB of memory")
	opts.listen.addFlags(cmd)
	return cmd
}

// source is an image to be served.
type source struct{ name, path, format string }

// sources returns what is to be served: the positional FILE, and the exports.
func (o *serveOptions) sources(args []string) ([]source, error) {
	var list []source
	for _, path := range args {
		list = append(list, source{path: path, format: o.format})
	}
	for _, export := range o.exports {
		name, path, found := strings.Cut(export, "=")
		if !found || name == "" || path == "" {
			return nil, fmt.Errorf("--export %s: want NAME=FILE", export)
		}
		list = append(list, source{name: name, path: path, format: o.format})
	}
	if len(list) == 0 {
		return nil, errors.New("nothing to serve: want FILE, or --export NAME=FILE")
	}
	for _, given := range o.formats {
		name, format, found := strings.Cut(given, "=")
		i := slices.IndexFunc(list, func(s source) bool { return s.name == name })
		if !found || name == "" || i < 0 {
			return nil, fmt.Errorf("--export-format %s: want NAME=FORMAT with the name of an --export", given)
		}
		list[i].format = format
	}
	if o.maxClients < 1 {
		return nil, fmt.Errorf("--max-clients %d: want at least 1", o.maxClients)
	}
	return list, nil
}

// processorsForWaiting is how many threads may wait in the kernel without the Go scheduler
// taking their processor away: as many as a connection has workers.
const processorsForWaiting = 16

// letWorkersWait gives the Go scheduler more processors than there are. A thread in a
// system call keeps its processor for as long as another is idle; where none is, on a
// machine with two, that is taken from it after 20 microseconds and handed to a thread
// with nothing to do, again and again: a fifth of the time of large requests.
func letWorkersWait() {
	if os.Getenv("GOMAXPROCS") == "" { // what a person says is obeyed
		runtime.GOMAXPROCS(runtime.NumCPU() + processorsForWaiting)
	}
}

func serve(cmd *cobra.Command, sources []source, opts serveOptions) (err error) {
	letWorkersWait()
	config, err := opts.listen.security()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
	exports := nbdlocal.NewExports(nbdlocal.ExportsOptions{
		MaxClients:  opts.maxClients,
		TLS:         config,
		TLSRequired: opts.listen.required(),
		ClientError: nbdlocal.LimitErrors(func(err error) { log.Warn("a client was refused or hung up on", "because", err) }),
	})
	listeners, err := opts.listen.open(log)
	if err != nil {
		return err
	}
	defer closeListeners(listeners)
	served, err := opts.openSources(cmd.Context(), sources, exports)
	defer func() { err = errors.Join(err, closeImages(served)) }()
	if err != nil {
		return err
	}
	if err := announceServed(cmd, served, opts.listen); err != nil {
		return err
	}
	return serveUntilDone(cmd.Context(), exports, listeners)
}

// servedImage is an image that is served.
type servedImage struct {
	*openedImage
	source
}

// openSources opens images and makes each an export. Those that it has opened are the
// caller's to close, also when another cannot be.
func (o *serveOptions) openSources(ctx context.Context, sources []source, exports *nbdlocal.Exports) ([]servedImage, error) {
	var list []servedImage
	for _, src := range sources {
		how := o.access
		how.format = src.format
		img, err := how.openServed(ctx, src.path, o.run, o.readOnly)
		if err != nil {
			return list, err
		}
		list = append(list, servedImage{img, src})
		server := nbdlocal.NewServer(img, nbdlocal.Options{ReadOnly: o.readOnly, Description: filepath.Base(src.path)})
		if err := exports.Add(src.name, server); err != nil {
			return list, err
		}
	}
	return list, nil
}

func closeImages(list []servedImage) error {
	var errs []error
	for _, img := range list {
		errs = append(errs, img.close())
	}
	return errors.Join(errs...)
}

// serveUntilDone serves clients until ctx ends, and answers what they have sent by then.
func serveUntilDone(ctx context.Context, exports *nbdlocal.Exports, listeners []net.Listener) error {
	served := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { served <- exports.Serve(context.WithoutCancel(ctx), l) }()
	}
	var err error
	left := len(listeners)
	select {
	case err = <-served: // one that fails ends them all
		left--
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainPatience)
	defer cancel()
	err = errors.Join(err, exports.Drain(drain))
	for range left {
		err = errors.Join(err, <-served)
	}
	return err
}

// openServed opens an image for a server: with a redo journal if it is to be written.
func (a *access) openServed(ctx context.Context, path string, run runDir, readOnly bool) (*openedImage, error) {
	if readOnly {
		return a.openWith(ctx, path, a.options(vfs.ReadOnly))
	}
	real, err := realPath(path)
	if err != nil {
		return nil, err
	}
	dir, err := run.journalDir(real)
	if err != nil {
		return nil, err
	}
	return a.openJournalled(ctx, path, dir)
}

// openJournalled opens an image for writing, with its redo journal in a directory that
// goes with it.
func (a *access) openJournalled(ctx context.Context, path, journalDir string) (*openedImage, error) {
	opts := a.options(vfs.ReadWrite)
	journal, err := openJournal(journalDir)
	if err != nil {
		return nil, err
	}
	opts.Journal = journal
	img, err := a.openWith(ctx, path, opts)
	if err != nil {
		dropJournalDir(journalDir)
		return nil, err
	}
	img.journalDir = journalDir
	return img, nil
}

// announceServed says that clients can connect, and where.
func announceServed(cmd *cobra.Command, list []servedImage, listen listenOptions) error {
	type export struct {
		Name        string   `json:"name"`
		Filename    string   `json:"filename"`
		Format      string   `json:"format"`
		VirtualSize int64    `json:"virtual-size"`
		ReadOnly    bool     `json:"read-only"`
		URIs        []string `json:"uris"`
	}
	var exports []export
	for _, img := range list {
		info := img.Info()
		exports = append(exports, export{img.name, img.path, img.formatName(), info.SizeBytes, info.ReadOnly, listen.uris(img.name)})
	}
	return emit(cmd, map[string]any{"exports": exports}, func(p *printer) {
		for _, x := range exports {
			access := ""
			if x.ReadOnly {
				access = ", read-only"
			}
			p.line("serving %s (%s, %s%s) at %s", x.Filename, x.Format, humanSize(x.VirtualSize), access, strings.Join(x.URIs, " and "))
		}
	})
}
