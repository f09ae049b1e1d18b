package supervisor

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// limitsInForce asks an attachment's server.
func (h *harness) limitsInForce(id string) filter.Limits {
	h.t.Helper()
	stats, err := h.client.Stats(h.ctx, id)
	if err != nil {
		h.t.Fatal(err)
	}
	return stats.Limits
}

func TestLimits_SurviveServerAndSupervisor(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	if got := h.limitsInForce(image); !got.None() {
		t.Errorf("limits nobody has set: %v", got)
	}
	want := filter.Limits{IOPS: 1000, BytesPerSecond: 10 << 20}
	set, err := h.client.SetLimits(h.ctx, image, &want)
	if err != nil || set.Limits == nil || *set.Limits != want {
		t.Fatalf("set: %+v, %v", set.Limits, err)
	}
	if got := h.limitsInForce(image); got != want {
		t.Errorf("in force: %v, want %v", got, want)
	}
	if again := h.attach(image); again.Limits == nil || *again.Limits != want {
		t.Errorf("attached again, without saying limits, they are %v", again.Limits)
	}
	killServer(t, at.PID)
	at = h.waitRestart(image, at.PID)
	if got := h.limitsInForce(image); got != want {
		t.Errorf("in force after the server was killed: %v, want %v", got, want)
	}
	if at.Recoveries != 1 {
		t.Errorf("%d recoveries are counted after one", at.Recoveries)
	}
	h.end()
	h.startHere()
	at = h.waitPhase(image, Serving)
	killServer(t, at.PID)
	h.waitRestart(image, at.PID)
	if got := h.limitsInForce(image); got != want {
		t.Errorf("in force after supervisor and server are others: %v, want %v", got, want)
	}
	if _, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{}); err != nil {
		t.Fatal(err)
	}
	if got := h.limitsInForce(image); got != want {
		t.Errorf("in force after an upgrade: %v, want %v", got, want)
	}
	if set, err = h.client.SetLimits(h.ctx, image, nil); err != nil || set.Limits != nil {
		t.Errorf("reset: %+v, %v", set.Limits, err)
	}
	if got := h.limitsInForce(image); !got.None() {
		t.Errorf("in force after a reset: %v", got)
	}
	h.detach(image)
}

func TestLimits_OfAttachRequest(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	r := request(image)
	r.Limits = &filter.Limits{IOPS: 77}
	if _, err := h.client.Attach(h.ctx, r); err != nil {
		t.Fatal(err)
	}
	if got := h.limitsInForce(image); got != *r.Limits {
		t.Errorf("in force: %v, asked for %v", got, *r.Limits)
	}
}

// A file IMAGE.iops has the test's device ask for a limit itself: see main_test.go.
func TestLimits_OfTheVolumeItself(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.write(image+".iops", "100")
	h.attach(image)
	if got := h.limitsInForce(image); got.IOPS != 100 {
		t.Errorf("the volume's limits are in force as %v", got)
	}
	h.write(image+".iops", "200")
	h.eventually("a change of the volume's limits", func() error {
		if got := h.limitsInForce(image); got.IOPS != 200 {
			return errors.New(got.String())
		}
		return nil
	})
	if _, err := h.client.SetLimits(h.ctx, image, &filter.Limits{IOPS: 300}); err != nil {
		t.Fatal(err)
	}
	if got := h.limitsInForce(image); got.IOPS != 300 {
		t.Errorf("what is set does not count instead of the volume's own: %v", got)
	}
	if _, err := h.client.SetLimits(h.ctx, image, nil); err != nil {
		t.Fatal(err)
	}
	if got := h.limitsInForce(image); got.IOPS != 200 {
		t.Errorf("the volume's own limits do not count again: %v", got)
	}
}

func TestLimits_Refused(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	_, err := h.client.SetLimits(h.ctx, image, &filter.Limits{IOPS: 1})
	if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "at least 10") {
		t.Errorf("one request a second: %v", err)
	}
	r := request(image)
	r.ID, r.Limits = "other", &filter.Limits{BytesPerSecond: 1}
	if _, err := h.client.Attach(h.ctx, r); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("attach with one byte a second: %v", err)
	}
	if _, err := h.client.SetLimits(h.ctx, "none", nil); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("limits of what is not attached: %v", err)
	}
}

func TestStats_CountRequests(t *testing.T) {
	p, image := newServerProcess(t)
	ctx := testContext(t)
	if _, err := p.hello(ctx); err != nil {
		t.Fatal(err)
	}
	stats, err := p.stats(ctx)
	if err != nil || len(stats.Requests.Ops) != len(filter.Ops) || stats.Image == nil || stats.Image.Layers != 1 {
		t.Errorf("stats of %s: %+v, %v", image, stats, err)
	}
}

func TestDebug(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	info, err := h.client.Debug(h.ctx, image)
	if err != nil || info.Goroutines == 0 || info.HeapBytes == 0 || !strings.Contains(info.Stacks, "converse") {
		t.Errorf("debug: %+v, %v", info, err)
	}
	if _, err := h.client.Debug(h.ctx, "none"); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("debug of what is not attached: %v", err)
	}
}

func TestHandle_ServesBesideTheAPI(t *testing.T) {
	h := newHarness(t)
	s, err := New(testConfig(h.values(), io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	s.Handle("GET /metrics", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "figures") }))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	h.eventually("an answer", func() error { return answers(h.ctx, h.client) })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return dialUnix("unix", SocketPath(h.stateDir))
	}}}
	resp, err := client.Get("http://supervisor/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || string(body) != "figures" {
		t.Errorf("%s, %v", body, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A read that hangs holds up one answer, for as long as it was given, and none after it.
func TestLately(t *testing.T) {
	values := make(chan int)
	l := lately[int]{read: func() int { return <-values }}
	if v, ok := l.get(time.Millisecond); ok {
		t.Errorf("a value before there is one: %d", v)
	}
	if v, ok := l.get(time.Hour); ok { // must not wait
		t.Errorf("a value before there is one: %d", v)
	}
	values <- 1
	for start := time.Now(); time.Since(start) < patience; time.Sleep(time.Millisecond) {
		if v, ok := l.get(time.Millisecond); ok && v == 1 {
			break
		}
	}
	if v, ok := l.get(time.Millisecond); !ok || v != 1 {
		t.Errorf("while the next read hangs: %d, %t", v, ok)
	}
	values <- 2
	go func() { values <- 3 }()
	for start := time.Now(); time.Since(start) < patience; time.Sleep(time.Millisecond) {
		if v, _ := l.get(patience); v == 3 {
			return
		}
	}
	t.Error("the last value never came")
}

func TestStartLimits_NotUnderstood(t *testing.T) {
	for _, text := range []string{"", "{", `{"iops":1}`} {
		t.Setenv(limitsEnv, text)
		if l := startLimits(); l != nil {
			t.Errorf("%q became %v", text, l)
		}
	}
	t.Setenv(limitsEnv, `{"iops":50}`)
	if l := startLimits(); l == nil || l.IOPS != 50 {
		t.Errorf("limits are not understood: %v", l)
	}
	if env := limitsEnviron(&filter.Limits{IOPS: 50}); len(env) != 1 || env[0] != limitsEnv+"="+os.Getenv(limitsEnv) {
		t.Errorf("the supervisor passes limits on as %q", env)
	}
}
