package supervisor

import (
	"context"
	"fmt"
	"net/http"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// Handle has the API's socket serve something else as well, such as metrics: see
// http.ServeMux for patterns. It is for before Run.
func (s *Supervisor) Handle(pattern string, handler http.Handler) {
	s.extra = append(s.extra, extraHandler{pattern, handler})
}

type extraHandler struct {
	pattern string
	handler http.Handler
}

// List returns all attachments, sorted by ID. It asks no server, and never waits for
// one. The error is nil; the method is like Client's.
func (s *Supervisor) List(context.Context) ([]Attachment, error) { return s.list(), nil }

// Stats returns what an attachment's server counts; see Client.Stats. It waits for the
// server, as long as ctx lets it.
func (s *Supervisor) Stats(ctx context.Context, id string) (ServerStats, error) {
	return s.stats(ctx, id)
}

func (s *Supervisor) limits(ctx context.Context, id string, req LimitsRequest) (Attachment, error) {
	if err := req.validate(); err != nil {
		return Attachment{}, fmt.Errorf("limits of %s: %w", id, err)
	}
	return s.submit(ctx, id, &command{kind: cmdLimits, limits: req.Limits})
}

// debug returns what an attachment's server tells of its inside.
func (s *Supervisor) debug(ctx context.Context, id string) (DebugInfo, error) {
	a, err := s.find(id)
	if err != nil {
		return DebugInfo{}, err
	}
	p := a.current.Load()
	if p == nil {
		return DebugInfo{}, fmt.Errorf("debug %s: no server runs: %w", id, block.ErrBusy)
	}
	resp, files, err := p.call(ctx, controlRequest{Op: opDebug}, nil)
	closeFiles(files)
	if err != nil {
		return DebugInfo{}, err
	}
	if resp.Debug == nil {
		return DebugInfo{}, fmt.Errorf("server process %d tells nothing of its inside: %w", p.pid, block.ErrUnsupported)
	}
	return *resp.Debug, nil
}

// setLimits gives a server limits; nil: those of its volume.
func (p *process) setLimits(ctx context.Context, limits *filter.Limits) error {
	_, files, err := p.call(ctx, controlRequest{Op: opLimits, Limits: limits}, nil)
	closeFiles(files)
	return err
}

// SetLimits changes the limits of an attachment while it is in use. They count until it
// is detached, whatever happens to processes; with nil the volume's own count again.
func (c *Client) SetLimits(ctx context.Context, id string, limits *filter.Limits) (Attachment, error) {
	var at Attachment
	err := c.do(ctx, http.MethodPost, attachmentPath(id)+"/limits", LimitsRequest{limits}, &at)
	return at, err
}

// Debug returns what an attachment's server tells of its inside; block.ErrBusy if none
// runs now.
func (c *Client) Debug(ctx context.Context, id string) (DebugInfo, error) {
	var info DebugInfo
	err := c.do(ctx, http.MethodGet, attachmentPath(id)+"/debug", nil, &info)
	return info, err
}
