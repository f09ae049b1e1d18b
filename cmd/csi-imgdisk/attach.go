package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// imageID begins the ids of attachments of images, so that they differ from volumes'.
const imageID = "image:"

func newAttachCommand() *cobra.Command {
	var how access
	var run runDir
	var readOnly bool
	var transport string
	cmd := &cobra.Command{
		Use:   "attach FILE",
		Short: "Make a block device on this machine from an image",
		Long: `Makes a block device from an image, and prints its path. A process of its own serves it; a
supervisor in the background keeps both going until the device is detached. Attaching an
image that is attached prints its device.

Give --format raw for a raw disk: a guest can write another format's header into it.`,
		Example: "  device=$(csi-imgdisk attach disk.vmdk)\n  mount $device /mnt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			att, err := attachImage(cmd.Context(), args[0], how, run, readOnly, transport)
			if err != nil {
				return err
			}
			return emit(cmd, newDeviceInfo(att), func(p *printer) { p.line("%s", att.Device) })
		},
	}
	how.addRootFlag(cmd)
	how.addFormatFlag(cmd, "format", "f", "the image's format; found out from its contents if not given")
	how.addSecretFlag(cmd, "secret-file")
	addRunDirFlag(cmd, &run)
	cmd.Flags().BoolVarP(&readOnly, "read-only", "r", false, "make a read-only device")
	cmd.Flags().StringVar(&transport, "transport", "", "how the kernel reaches the server: nbd, ublk or fuse; by default the best that works here")
	return cmd
}

func attachImage(ctx context.Context, path string, how access, run runDir, readOnly bool, transport string) (supervisor.Attachment, error) {
	at, err := locate(path, how.root)
	if err != nil {
		return supervisor.Attachment{}, err
	}
	defer at.close()
	if err := how.settleFormat(at); err != nil {
		return supervisor.Attachment{}, err
	}
	client, err := ensureSupervisor(ctx, run)
	if err != nil {
		return supervisor.Attachment{}, err
	}
	how.root = at.root
	if how.secretFile != "" { // the server has another working directory
		if how.secretFile, err = filepath.Abs(how.secretFile); err != nil {
			return supervisor.Attachment{}, err
		}
	}
	att, err := client.Attach(ctx, supervisor.AttachRequest{
		ID:        imageID + at.path(),
		Server:    imageServer(at.path(), how, run, readOnly),
		Transport: transport,
		ReadOnly:  readOnly,
	})
	if err == nil {
		return att, nil
	}
	if errors.Is(err, block.ErrExists) {
		err = fmt.Errorf("%w: it is attached already, with other options: detach it first", err)
	}
	return att, errors.Join(how.explain(at.explain(err)), stopIdleSupervisor(context.WithoutCancel(ctx), run))
}

// stopIdleSupervisor ends the supervisor if nothing is attached. Whoever attaches meanwhile
// wins.
func stopIdleSupervisor(ctx context.Context, run runDir) error {
	ctx, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	if err := supervisor.Stop(ctx, run.supervisor()); !errors.Is(err, block.ErrBusy) {
		return err
	}
	return nil
}

func newDetachCommand() *cobra.Command {
	var run runDir
	var force bool
	cmd := &cobra.Command{
		Use:   "detach DEVICE|FILE",
		Short: "Remove a block device that attach made",
		Long:  "Removes a block device. When it returns, everything written is durable and the image is\nclosed. A device that is in use stays.",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := runningSupervisor(run)
			att, err := findAttachment(cmd.Context(), client, args[0])
			if err != nil {
				return err
			}
			if err := client.Detach(cmd.Context(), att.ID, force); err != nil {
				return err
			}
			if err := stopIdleSupervisor(cmd.Context(), run); err != nil {
				return err
			}
			return emit(cmd, newDeviceInfo(att), func(p *printer) { p.line("detached %s", att.Device) })
		},
	}
	addRunDirFlag(cmd, &run)
	cmd.Flags().BoolVar(&force, "force", false, "remove it although it is in use: its users get errors, and what was not flushed may be lost")
	return cmd
}

// findAttachment returns the attachment with a device, or of an image.
func findAttachment(ctx context.Context, client *supervisor.Client, what string) (supervisor.Attachment, error) {
	list, err := client.List(ctx)
	if err != nil && !errors.Is(err, supervisor.ErrNotRunning) {
		return supervisor.Attachment{}, err
	}
	real, err := realPath(what)
	if err != nil {
		if real, err = filepath.Abs(what); err != nil {
			return supervisor.Attachment{}, err
		}
	}
	for _, att := range list {
		if att.Device != "" && (att.Device == what || att.Device == real) || att.ID == imageID+real || att.ID == what {
			return att, nil
		}
	}
	return supervisor.Attachment{}, fmt.Errorf("%s is not attached: csi-imgdisk devices lists what is", what)
}

// deviceInfo is an attached device as `devices` shows it.
type deviceInfo struct {
	Device    string `json:"device"`
	Image     string `json:"image,omitempty"`
	Volume    string `json:"volume,omitempty"`
	SizeBytes int64  `json:"size"`
	ReadOnly  bool   `json:"read-only"`
	Transport string `json:"transport"`
	Phase     string `json:"phase"`
	PID       int    `json:"pid,omitempty"`
	Version   string `json:"version,omitempty"` // of the program that serves it
	Restarts  int    `json:"restarts"`
	Problem   string `json:"problem,omitempty"`
}

func newDeviceInfo(att supervisor.Attachment) deviceInfo {
	info := deviceInfo{
		Device: att.Device, SizeBytes: att.SizeBytes, ReadOnly: att.ReadOnly, Transport: att.Transport,
		Phase: string(att.Phase), PID: att.PID, Version: att.Version,
		Restarts: att.Restarts, Problem: att.Problem,
	}
	if path, ok := strings.CutPrefix(att.ID, imageID); ok {
		info.Image = path
	} else {
		info.Volume = att.ID
	}
	return info
}
