package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// access is how an image named on the command line is opened.
type access struct {
	root       string
	format     string
	forceShare bool
	secretFile string
	// chainFormat is the format of parents whose child does not say it; "" probes.
	chainFormat string
}

func (a *access) addFlags(cmd *cobra.Command) {
	a.addRootFlag(cmd)
	a.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	a.addSecretFlag(cmd, "secret-file")
	cmd.Flags().BoolVarP(&a.forceShare, "force-share", "U", false,
		"do not mind that somebody else writes the image: what is seen may be out of date or inconsistent")
}

func (a *access) addChainFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.chainFormat, "chain-format", "",
		"format of what the image stands on, where that is not said (QCOW); found out from its contents if not given")
}

// addSecretFlag adds the flag for passwords: those on a command line are seen by everybody.
func (a *access) addSecretFlag(cmd *cobra.Command, name string) {
	cmd.Flags().StringVar(&a.secretFile, name, "", "file with the password of an encrypted image; a line break at its end does not count")
}

// secret returns what to ask for passwords, nil if there are none.
func (a *access) secret() formats.Secret { return secretFrom(a.secretFile) }

// anySecret is secret for work that reads nothing encrypted: without the password, any
// will do.
func (a *access) anySecret() formats.Secret {
	if a.secretFile != "" {
		return a.secret()
	}
	return func(string) ([]byte, error) { return []byte("unknown"), nil }
}

// secretFrom returns a Secret that has one password for all images, nil for no file.
func secretFrom(path string) formats.Secret {
	if path == "" {
		return nil
	}
	return func(string) ([]byte, error) {
		password, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read the password: %w", err)
		}
		return bytes.TrimSuffix(bytes.TrimSuffix(password, []byte("\n")), []byte("\r")), nil
	}
}

func (a *access) addRootFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.root, "root", "",
		"directory in which the image and what it refers to must lie; by default its store's, or its own")
}

func (a *access) addFormatFlag(cmd *cobra.Command, name, short, usage string) {
	cmd.Flags().StringVarP(&a.format, name, short, "", usage)
}

// openedImage is an open image and where it lies.
type openedImage struct {
	*formats.Image
	at         *location
	journalDir string // that goes when it is closed; "" without
}

// open opens an image with everything it stands on.
func (a *access) open(ctx context.Context, path string, mode vfs.Mode) (*openedImage, error) {
	return a.openWith(ctx, path, a.options(mode))
}

func (a *access) options(mode vfs.Mode) formats.OpenOptions {
	opts := formats.OpenOptions{Format: a.format, Mode: mode, NoLock: a.forceShare, Secret: a.secret()}
	if a.chainFormat != "" {
		opts.ParentFormats = map[string]string{"": a.chainFormat}
	}
	return opts
}

func (a *access) openWith(ctx context.Context, path string, opts formats.OpenOptions) (*openedImage, error) {
	at, err := locate(path, a.root)
	if err != nil {
		return nil, err
	}
	img, err := formats.Open(ctx, at.fs, at.name, opts)
	if err != nil {
		at.close()
		return nil, a.explain(at.explain(err))
	}
	return &openedImage{Image: img, at: at}, nil
}

// settleFormat finds an image's format out, if it was not given, for all times that its
// server is started: a guest can write any header into a raw disk.
func (a *access) settleFormat(at *location) error {
	if a.format != "" {
		_, err := formats.Lookup(a.format)
		return err
	}
	format, err := formats.Probe(at.fs, at.name)
	if err != nil {
		return err
	}
	a.format = format.Name()
	return nil
}

// explain adds what a person can do about an image that is in use.
func (a *access) explain(err error) error {
	if errors.Is(err, block.ErrLocked) {
		return fmt.Errorf("%w; csi-imgdisk devices lists what is attached here", err)
	}
	return err
}

// close closes the image; what was written is durable then.
func (o *openedImage) close() error {
	defer o.at.close()
	defer dropJournalDir(o.journalDir)
	return o.Close()
}

// release closes an image that was only read.
func (o *openedImage) release() { _ = o.close() } // nothing can be lost

// formatName returns the format of the image itself.
func (o *openedImage) formatName() string { return o.Layers()[0].Format }

// hostPath returns the path of a file in the image's tree.
func (o *openedImage) hostPath(named, name string) string { return o.at.hostPath(named, name) }
