package wire

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// Attacher makes a supervisor the driver's. ServerArgs says how a volume's server is
// run; see the function of that name.
func Attacher(client *supervisor.Client, serverArgs func(driver.AttachSpec) ([]string, error)) driver.Attacher {
	return attacher{client, serverArgs}
}

type attacher struct {
	client     *supervisor.Client
	serverArgs func(driver.AttachSpec) ([]string, error)
}

func (a attacher) Attach(ctx context.Context, spec driver.AttachSpec) (driver.Attachment, error) {
	args, err := a.serverArgs(spec)
	if err != nil {
		return driver.Attachment{}, err
	}
	req := supervisor.AttachRequest{ID: spec.Handle, Server: args, Transport: spec.Transport, ReadOnly: spec.ReadOnly}
	if l := spec.Limits; l != (driver.Limits{}) {
		req.Limits = &filter.Limits{IOPS: l.IOPS, BytesPerSecond: l.BytesPerSecond}
	}
	at, err := a.client.Attach(ctx, req)
	return fromAttachment(at), translate(err)
}

func (a attacher) Attachment(ctx context.Context, handle string) (driver.Attachment, error) {
	at, err := a.client.Get(ctx, handle)
	return fromAttachment(at), translate(err)
}

func (a attacher) Resize(ctx context.Context, handle string) (driver.Attachment, error) {
	at, err := a.client.Resize(ctx, handle)
	return fromAttachment(at), translate(err)
}

func (a attacher) Detach(ctx context.Context, handle string) error {
	return translate(a.client.Detach(ctx, handle, false))
}

func (a attacher) Transports(ctx context.Context) (names []string, err error) {
	status, err := a.client.Status(ctx)
	for _, t := range status.Transports {
		if t.Problem == "" {
			names = append(names, t.Name)
		}
	}
	return names, translate(err)
}

func fromAttachment(at supervisor.Attachment) driver.Attachment {
	return driver.Attachment{
		Device: at.Device, SizeBytes: at.SizeBytes, ReadOnly: at.ReadOnly,
		Lost: at.Phase == supervisor.Lost, Problem: at.Problem,
	}
}

// translate tells the driver that a supervisor is being restarted.
func translate(err error) error {
	if errors.Is(err, supervisor.ErrNotRunning) {
		return fmt.Errorf("%w: %w", driver.ErrUnavailable, err)
	}
	return err
}

func unknownStore(name string) error {
	return fmt.Errorf("store %q is not configured on this node: %w", name, block.ErrInvalid)
}
