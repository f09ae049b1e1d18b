package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestWireError(t *testing.T) {
	for _, k := range kinds {
		err := fmt.Errorf("do something: %w", k.sentinel)
		back := toWire(err).err()
		if !errors.Is(back, k.sentinel) || back.Error() != err.Error() {
			t.Errorf("%v came back as %v", err, back)
		}
	}
	if back := toWire(errors.New("odd")).err(); back.Error() != "odd" {
		t.Errorf("an error without a sentinel came back as %v", back)
	}
	if back := toWire(errors.Join(block.ErrNoSpace, block.ErrPoisoned)).err(); !errors.Is(back, block.ErrPoisoned) {
		t.Errorf("a poisoned image's error came back as %v", back)
	}
	if err := toWire(nil).err(); err != nil {
		t.Errorf("no error came back as %v", err)
	}
}

// IDs are handles and paths: every character must get through.
func TestAPI_OddIDs(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	for _, id := range []string{
		"nfs/pvc-1", "/srv/images/a b.vmdk", "..%2F", "a/../b", "...", "a//b/", "?x=y&z#f", `"quotes"`, "ümläut", "line\nbreak",
		strings.Repeat("x", maxIDBytes),
	} {
		r := request(image)
		r.ID = id
		if at, err := h.client.Attach(h.ctx, r); err != nil || at.ID != id {
			t.Errorf("attach %.40q: %+v, %v", id, at, err)
			continue
		}
		if at, err := h.client.Get(h.ctx, id); err != nil || at.ID != id {
			t.Errorf("get %.40q: %+v, %v", id, at, err)
		}
		if err := h.client.Detach(h.ctx, id, false); err != nil {
			t.Errorf("detach %.40q: %v", id, err)
		}
	}
}

func TestAPI_BadRequests(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	client := &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return dialUnix("unix", SocketPath(h.stateDir))
	}}}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		method, path, body string
		status             int
		kind               string
	}{
		{"POST", "/v1/attachments", "{", 400, "invalid"},
		{"POST", "/v1/attachments", `{"id":"x","server":"not a list"}`, 400, "invalid"},
		{"POST", "/v1/attachments", `{"id":"` + strings.Repeat("x", maxRequestBytes) + `"}`, 400, "invalid"},
		{"POST", "/v1/attachments", `{"id":"x","server":["` + strings.Repeat("x", maxServerBytes+1) + `"]}`, 400, "invalid"},
		{"DELETE", "/v1/attachments/x?force=perhaps", "", 400, "invalid"},
		{"DELETE", "/v1/attachments/x", "", 404, "not-found"},
		{"GET", "/v1/attachments/x/more", "", 501, "unsupported"},
		{"PUT", "/v1/attachments", "", 501, "unsupported"},
		{"GET", "/v2/status", "", 501, "unsupported"},
	} {
		req, err := http.NewRequestWithContext(h.ctx, c.method, "http://supervisor"+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || !strings.Contains(string(body), `"kind":"`+c.kind+`"`) {
			t.Errorf("%s %s %.40s: %d %s, %v; want %d with kind %s", c.method, c.path, c.body, resp.StatusCode, body, err, c.status, c.kind)
		}
	}
}
