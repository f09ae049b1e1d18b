package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// drainPatience is how long requests may take that a client has sent when the server is
// to end.
const drainPatience = 30 * time.Second

type serveOptions struct {
	access
	run      runDir
	socket   string
	readOnly bool
}

func newServeCommand() *cobra.Command {
	var opts serveOptions
	cmd := &cobra.Command{
		Use:   "serve FILE --socket PATH",
		Short: "Serve an image over NBD on a unix socket",
		Long: `Serves an image to NBD clients (qemu-io, nbdcopy, fio, nbd-client) on a unix socket, until
it gets SIGTERM or SIGINT; then it answers what it was sent, makes everything durable and
closes the image.

A writable image has a redo journal in the run directory: if this process is killed, every
write it had answered is there again when the image is served, or attached, the next time.

Give --format raw for a raw disk: a guest can write another format's header into it.`,
		Example: "  csi-imgdisk serve disk.vmdk --socket /run/disk.sock &\n  qemu-io -f raw 'nbd+unix:///?socket=/run/disk.sock'",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return serve(cmd, args[0], opts)
		},
	}
	opts.addRootFlag(cmd)
	opts.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	opts.addSecretFlag(cmd, "secret-file")
	addRunDirFlag(cmd, &opts.run)
	cmd.Flags().StringVar(&opts.socket, "socket", "", "unix socket to listen on")
	cmd.Flags().BoolVarP(&opts.readOnly, "read-only", "r", false, "refuse writes")
	if err := cmd.MarkFlagRequired("socket"); err != nil {
		panic(err)
	}
	return cmd
}

func serve(cmd *cobra.Command, path string, opts serveOptions) error {
	listener, err := listenUnix(opts.socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	img, err := opts.openServed(cmd.Context(), path, opts.run, opts.readOnly)
	if err != nil {
		return err
	}
	if err := announceServed(cmd, img, path, opts.socket); err != nil {
		return errors.Join(err, img.close())
	}
	server := nbdlocal.NewServer(img, nbdlocal.Options{ReadOnly: opts.readOnly, Description: path})
	err = serveUntilDone(cmd.Context(), server, listener)
	return errors.Join(err, img.close())
}

// serveUntilDone serves clients until ctx ends, and answers what they have sent by then.
func serveUntilDone(ctx context.Context, server *nbdlocal.Server, listener net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.WithoutCancel(ctx), listener) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainPatience)
	defer cancel()
	return errors.Join(server.Drain(drain), <-served)
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

// announceServed says that clients can connect.
func announceServed(cmd *cobra.Command, img *openedImage, path, socket string) error {
	info := img.Info()
	uri := "nbd+unix:///?socket=" + socket
	result := map[string]any{"filename": path, "format": img.formatName(), "uri": uri,
		"virtual-size": info.SizeBytes, "read-only": info.ReadOnly}
	return emit(cmd, result, func(p *printer) {
		access := ""
		if info.ReadOnly {
			access = ", read-only"
		}
		p.line("serving %s (%s, %s%s) at %s", path, img.formatName(), humanSize(info.SizeBytes), access, uri)
	})
}

// listenUnix listens on a socket. One that a killed process left is replaced.
func listenUnix(path string) (net.Listener, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if err := removeStaleSocket(path); err != nil {
		return nil, err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

func removeStaleSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return fmt.Errorf("listen on %s: %w as something other than a socket", path, block.ErrExists)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("listen on %s: %w", path, block.ErrLocked)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("listen on %s: %w", path, err)
	}
	return os.Remove(path)
}
