package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// maxNodes bounds how many nodes read a volume at once, and with it the record.
const maxNodes = 1024

// PublishRequest says where a volume is going to be used.
type PublishRequest struct {
	Volume   string
	Node     string
	ReadOnly bool
	// Shared lets other nodes read the volume too; it needs ReadOnly.
	Shared bool
}

func (r PublishRequest) validate() error {
	switch {
	case r.Node == "" || len(r.Node) > 256:
		return fmt.Errorf("publish volume %s: node %.260q: %w: want a name of 1 to 256 bytes", r.Volume, r.Node, block.ErrInvalid)
	case r.Shared && !r.ReadOnly:
		return fmt.Errorf("publish volume %s: %w: only readers can share a volume", r.Volume, block.ErrInvalid)
	}
	return checkVolumeName(r.Volume)
}

// Publish gives a volume to a node and returns the publication's epoch, with which the
// node attaches it. The same request again returns the same epoch. ErrBusy names the node
// that has the volume; ErrExists says that this node has it in another way.
func (s *Store) Publish(ctx context.Context, req PublishRequest) (epoch int64, err error) {
	if err := req.validate(); err != nil {
		return 0, err
	}
	_, err = s.update(ctx, req.Volume, func(rec *Record) error {
		if err := rec.exists(); err != nil {
			return err
		}
		if a := rec.attachment(req.Node); a != nil {
			epoch = a.Epoch
			return a.sameAs(req)
		}
		for _, a := range rec.Attachments {
			if !req.Shared || !a.Shared {
				return fmt.Errorf("publish volume %s to node %s: %w: it is published to node %s", req.Volume, req.Node, block.ErrBusy, a.Node)
			}
		}
		if len(rec.Attachments) >= maxNodes {
			return fmt.Errorf("publish volume %s to node %s: %w: it is published to %d nodes already", req.Volume, req.Node, block.ErrBusy, maxNodes)
		}
		rec.Epoch++
		epoch = rec.Epoch
		rec.Attachments = append(rec.Attachments, Attachment{
			Node: req.Node, Epoch: epoch, ReadOnly: req.ReadOnly, Shared: req.Shared, Since: now(),
		})
		return nil
	})
	if err != nil {
		return 0, err
	}
	return epoch, nil
}

// sameAs returns ErrExists when the node has the volume in another way than requested.
func (a *Attachment) sameAs(req PublishRequest) error {
	mode := map[bool]string{true: "reading only", false: "writing"}
	if a.ReadOnly != req.ReadOnly {
		return fmt.Errorf("publish volume %s to node %s: %w there, for %s; unpublish it before publishing it for %s",
			req.Volume, req.Node, block.ErrExists, mode[a.ReadOnly], mode[req.ReadOnly])
	}
	if a.Shared != req.Shared {
		return fmt.Errorf("publish volume %s to node %s: %w there, shared=%t; unpublish it before publishing it with shared=%t",
			req.Volume, req.Node, block.ErrExists, a.Shared, req.Shared)
	}
	return nil
}

// Unpublish takes a volume from a node, or from all if node is "". A server that still
// has it there is fenced. What is not published, or does not exist, is fine.
func (s *Store) Unpublish(ctx context.Context, name, node string) error {
	if err := checkVolumeName(name); err != nil {
		return err
	}
	_, err := s.updateAnyway(ctx, name, func(rec *Record) error {
		rec.Attachments = slices.DeleteFunc(rec.Attachments, func(a Attachment) bool { return node == "" || a.Node == node })
		return nil
	})
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	return err
}

// attachment returns a node's attachment, or nil.
func (r *Record) attachment(node string) *Attachment {
	for i := range r.Attachments {
		if r.Attachments[i].Node == node {
			return &r.Attachments[i]
		}
	}
	return nil
}

// serving returns the node that may have changes of the volume which are not in the
// store yet, or "".
func (r *Record) serving() string {
	for _, a := range r.Attachments {
		if a.Serving {
			return a.Node
		}
	}
	return ""
}

// nodes names where the volume is published, for messages.
func (r *Record) nodes() string {
	var names []string
	for _, a := range r.Attachments {
		names = append(names, a.Node)
	}
	return strings.Join(names, ", ")
}

// now is the time that records hold: whole milliseconds, comparable between time zones.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }
