package supervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"syscall"
)

// Client talks to a supervisor. Its methods are safe for concurrent use. They wait
// until the supervisor has answered or ctx ends; what a supervisor has begun it
// finishes also for a client that is gone. Errors wrap block's sentinels as the
// supervisor's did, or ErrNotRunning when none answers.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the supervisor that listens on a socket; see
// SocketPath. It does not connect.
func NewClient(socketPath string) *Client {
	return &Client{
		socket: socketPath,
		http: &http.Client{Transport: &http.Transport{
			DialContext: func(context.Context, string, string) (net.Conn, error) {
				return dialUnix("unix", socketPath)
			},
			DisableKeepAlives: true, // the next request may be for the next supervisor
		}},
	}
}

// Attach makes a volume's block device, or returns the one there is; see
// AttachRequest. It returns when the device is being served. On an error nothing is
// left behind, unless ctx ended: then the attach may still succeed, and asking again
// is right.
//
// An error of the server's open comes back as it was, such as block.ErrCorrupt or
// block.ErrLocked; block.ErrExists means that the ID is attached otherwise.
func (c *Client) Attach(ctx context.Context, req AttachRequest) (Attachment, error) {
	var at Attachment
	err := c.do(ctx, http.MethodPost, "/v1/attachments", req, &at)
	return at, err
}

// Get returns one attachment; block.ErrNotFound if there is none with the ID.
func (c *Client) Get(ctx context.Context, id string) (Attachment, error) {
	var at Attachment
	err := c.do(ctx, http.MethodGet, attachmentPath(id), nil, &at)
	return at, err
}

// List returns all attachments, sorted by ID.
func (c *Client) List(ctx context.Context) ([]Attachment, error) {
	var list []Attachment
	err := c.do(ctx, http.MethodGet, "/v1/attachments", nil, &list)
	return list, err
}

// Stats returns what an attachment's server counts; block.ErrBusy if none runs now.
func (c *Client) Stats(ctx context.Context, id string) (ServerStats, error) {
	var stats ServerStats
	err := c.do(ctx, http.MethodGet, attachmentPath(id)+"/stats", nil, &stats)
	return stats, err
}

// Resize gives the kernel's device the size that the server's device has now, rounded
// down to whole blocks. Smaller than it is is block.ErrInvalid; block.ErrBusy means
// that the volume is not being served at the moment.
func (c *Client) Resize(ctx context.Context, id string) (Attachment, error) {
	var at Attachment
	err := c.do(ctx, http.MethodPost, attachmentPath(id)+"/resize", nil, &at)
	return at, err
}

// Upgrade replaces an attachment's server by one of another program. Requests wait
// meanwhile, for well under a second as a rule: the successor is started before the
// server stops, and takes the kernel's descriptors over. An error says why the successor
// does not serve; the program that served before does then, or is being started for it.
// block.ErrBusy: the volume was not being served.
func (c *Client) Upgrade(ctx context.Context, id string, req UpgradeRequest) (Attachment, error) {
	var at Attachment
	err := c.do(ctx, http.MethodPost, attachmentPath(id)+"/upgrade", req, &at)
	return at, err
}

// UpgradeAll upgrades all attachments whose servers are of another program, one after
// another. It ends with the first successor that does not serve, which is not an error:
// the results tell, for the attachments it came to.
func (c *Client) UpgradeAll(ctx context.Context, req UpgradeRequest) ([]UpgradeResult, error) {
	var results []UpgradeResult
	err := c.do(ctx, http.MethodPost, "/v1/upgrade", req, &results)
	return results, err
}

// Detach removes a volume's device. When it returns nil everything written is
// durable, the image closed and the device gone. block.ErrBusy: the device is in use,
// and nothing has changed. block.ErrNotFound: there is no such attachment. Another
// error after which the attachment is Detaching says that the device is gone and the
// image could not be closed; detaching again opens and closes it once more.
//
// With force the device goes at once, whatever its users and its store do: requests
// in flight fail, and what was not flushed may be lost.
func (c *Client) Detach(ctx context.Context, id string, force bool) error {
	query := ""
	if force {
		query = "?force=" + strconv.FormatBool(force)
	}
	return c.do(ctx, http.MethodDelete, attachmentPath(id)+query, nil, nil)
}

// Status returns what the supervisor says of itself and of the node's transports.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var status Status
	err := c.do(ctx, http.MethodGet, "/v1/status", nil, &status)
	return status, err
}

// Stop ends a supervisor that has no attachments, else block.ErrBusy. It returns when
// the supervisor is ending, which takes a moment more: the function Stop waits for
// that. The state directory stays, with a lock file and perhaps a log in it.
func (c *Client) Stop(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/stop", nil, nil)
}

// Leave ends a supervisor and leaves everything attached, for the next one to take over:
// see Replace. Like Stop it returns when the supervisor is ending.
func (c *Client) Leave(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "/v1/stop", stopRequest{Keep: true}, nil)
}

func attachmentPath(id string) string { return "/v1/attachments/" + url.PathEscape(id) }

// maxAnswerBytes bounds an answer: a list of some thousand attachments.
const maxAnswerBytes = 64 << 20

// do sends one request and decodes the answer into answer, unless that is nil.
func (c *Client) do(ctx context.Context, method, path string, body, answer any) error {
	var content io.Reader
	if body != nil {
		content = bytes.NewReader(marshal(body))
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, content)
	if err != nil {
		return fmt.Errorf("supervisor at %s: %w", c.socket, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(err)
	}
	defer resp.Body.Close()
	received, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return c.transportError(err)
	}
	if resp.StatusCode != http.StatusOK {
		var wire wireError
		if err := json.Unmarshal(received, &wire); err != nil || wire.Message == "" {
			return fmt.Errorf("supervisor at %s answers %s", c.socket, resp.Status)
		}
		return wire.err()
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(received, answer); err != nil {
		return fmt.Errorf("supervisor at %s: answer: %w", c.socket, err)
	}
	return nil
}

// transportError marks the errors that mean that the supervisor is not, or no longer,
// there.
func (c *Client) transportError(err error) error {
	var urlErr *url.Error
	if errors.As(err, &urlErr) {
		err = urlErr.Err // the URL is made up
	}
	for _, gone := range []error{os.ErrNotExist, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, gone) {
			return fmt.Errorf("%w: %w", ErrNotRunning, err)
		}
	}
	return fmt.Errorf("supervisor at %s: %w", c.socket, err)
}
