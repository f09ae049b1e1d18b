package metrics

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

var (
	_ Source = (*supervisor.Supervisor)(nil)
	_ Source = (*supervisor.Client)(nil)
)

// fakeSource has attachments, and what their servers say.
type fakeSource struct {
	list  []supervisor.Attachment
	stats map[string]supervisor.ServerStats
	err   error
}

func (f *fakeSource) List(context.Context) ([]supervisor.Attachment, error) { return f.list, f.err }

// Stats hangs, as a server does, for an attachment without stats.
func (f *fakeSource) Stats(ctx context.Context, id string) (supervisor.ServerStats, error) {
	if stats, ok := f.stats[id]; ok {
		return stats, nil
	}
	<-ctx.Done()
	return supervisor.ServerStats{}, ctx.Err()
}

// figures are of three reads, a write that failed and a flush that was slow.
func figures() filter.Figures {
	return filter.Figures{Ops: []filter.OpFigures{
		{Op: "read", Bytes: 4096, Nanoseconds: 2_000_000, Latency: filter.Latency{0, 1, 0, 2}, InFlight: 3, Stalled: 1},
		{Op: "write", Nanoseconds: 1000, Latency: filter.Latency{1}, Errors: map[string]uint64{"ENOSPC": 1}},
		{Op: "flush", Nanoseconds: 2e9, Latency: append(make(filter.Latency, 21), 1)},
	}}
}

func source() *fakeSource {
	const id = "main/vol"
	return &fakeSource{
		list: []supervisor.Attachment{{
			AttachRequest: supervisor.AttachRequest{ID: id, Transport: "nbd"},
			Phase:         supervisor.Serving, Device: "/dev/nbd0", SizeBytes: 1 << 30, PID: os.Getpid(), Restarts: 2, Recoveries: 1,
		}},
		stats: map[string]supervisor.ServerStats{id: {
			Since: time.UnixMilli(1_700_000_000_500), Requests: figures(),
			Limits: filter.Limits{IOPS: 500}, Waits: filter.Waits{Waiting: 1, Delayed: 7, Nanoseconds: 3e9},
			Image: &supervisor.ImageStats{TableHits: 90, TableMisses: 10, AllocatedBytes: 1 << 20, Layers: 3},
		}},
	}
}

func TestCollector_Values(t *testing.T) {
	want := strings.NewReplacer("DEVICE", `device="/dev/nbd0"`, "VOLUME", `transport="nbd",volume="main/vol"`).Replace(`
# HELP csi_imgdisk_volume_operations_total Requests that have ended, well or not.
# TYPE csi_imgdisk_volume_operations_total counter
csi_imgdisk_volume_operations_total{DEVICE,op="discard",VOLUME} 0
csi_imgdisk_volume_operations_total{DEVICE,op="flush",VOLUME} 1
csi_imgdisk_volume_operations_total{DEVICE,op="read",VOLUME} 3
csi_imgdisk_volume_operations_total{DEVICE,op="write",VOLUME} 1
csi_imgdisk_volume_operations_total{DEVICE,op="zero",VOLUME} 0
# HELP csi_imgdisk_volume_errors_total Requests that have failed, by the error that their users were told.
# TYPE csi_imgdisk_volume_errors_total counter
csi_imgdisk_volume_errors_total{DEVICE,errno="EIO",op="discard",VOLUME} 0
csi_imgdisk_volume_errors_total{DEVICE,errno="EIO",op="flush",VOLUME} 0
csi_imgdisk_volume_errors_total{DEVICE,errno="EIO",op="read",VOLUME} 0
csi_imgdisk_volume_errors_total{DEVICE,errno="EIO",op="write",VOLUME} 0
csi_imgdisk_volume_errors_total{DEVICE,errno="EIO",op="zero",VOLUME} 0
csi_imgdisk_volume_errors_total{DEVICE,errno="ENOSPC",op="write",VOLUME} 1
# HELP csi_imgdisk_volume_stalls_total Requests that have ended and took longer than about a second (1.048576 s).
# TYPE csi_imgdisk_volume_stalls_total counter
csi_imgdisk_volume_stalls_total{DEVICE,op="discard",VOLUME} 0
csi_imgdisk_volume_stalls_total{DEVICE,op="flush",VOLUME} 1
csi_imgdisk_volume_stalls_total{DEVICE,op="read",VOLUME} 0
csi_imgdisk_volume_stalls_total{DEVICE,op="write",VOLUME} 0
csi_imgdisk_volume_stalls_total{DEVICE,op="zero",VOLUME} 0
# HELP csi_imgdisk_volume_recoveries_total Times that the device was given to another server after the one before had ended.
# TYPE csi_imgdisk_volume_recoveries_total counter
csi_imgdisk_volume_recoveries_total{DEVICE,VOLUME} 1
# HELP csi_imgdisk_volume_chain_depth Images that the volume's contents come from: 1 is an image alone.
# TYPE csi_imgdisk_volume_chain_depth gauge
csi_imgdisk_volume_chain_depth{DEVICE,VOLUME} 3
# HELP csi_imgdisk_volume_limit_operations_per_second The volume's limit of requests; missing without one.
# TYPE csi_imgdisk_volume_limit_operations_per_second gauge
csi_imgdisk_volume_limit_operations_per_second{DEVICE,VOLUME} 500
# HELP csi_imgdisk_volume_throttled_seconds_total Time that requests have waited for the volume's limits, together.
# TYPE csi_imgdisk_volume_throttled_seconds_total counter
csi_imgdisk_volume_throttled_seconds_total{DEVICE,VOLUME} 3
`)
	c := NewCollector(source(), "1.2.3")
	err := testutil.CollectAndCompare(c, strings.NewReader(want),
		"csi_imgdisk_volume_operations_total", "csi_imgdisk_volume_errors_total", "csi_imgdisk_volume_stalls_total",
		"csi_imgdisk_volume_recoveries_total", "csi_imgdisk_volume_chain_depth", "csi_imgdisk_volume_limit_operations_per_second",
		"csi_imgdisk_volume_limit_bytes_per_second", "csi_imgdisk_volume_throttled_seconds_total")
	if err != nil {
		t.Error(err)
	}
}

func TestCollector_Histogram(t *testing.T) {
	text := scrape(t, source())
	for _, want := range []string{
		`duration_seconds_bucket{device="/dev/nbd0",op="read",transport="nbd",volume="main/vol",le="1e-06"} 0`,
		`duration_seconds_bucket{device="/dev/nbd0",op="read",transport="nbd",volume="main/vol",le="4e-06"} 1`,
		`duration_seconds_bucket{device="/dev/nbd0",op="read",transport="nbd",volume="main/vol",le="1.6e-05"} 3`,
		`duration_seconds_bucket{device="/dev/nbd0",op="flush",transport="nbd",volume="main/vol",le="1.048576"} 0`,
		`duration_seconds_bucket{device="/dev/nbd0",op="flush",transport="nbd",volume="main/vol",le="4.194304"} 1`,
		`duration_seconds_sum{device="/dev/nbd0",op="read",transport="nbd",volume="main/vol"} 0.002`,
		`duration_seconds_count{device="/dev/nbd0",op="read",transport="nbd",volume="main/vol"} 3`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("missing: %s", want)
		}
	}
}

// What a Collector describes is what it collects, and follows Prometheus' rules.
func TestCollector_DescribedAndClean(t *testing.T) {
	c := NewCollector(source(), "1.2.3")
	problems, err := testutil.CollectAndLint(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	text := scrape(t, source())
	for _, d := range Descriptions() {
		if d.Name == "csi_imgdisk_volume_limit_bytes_per_second" {
			continue // the volume has no such limit
		}
		if !strings.Contains(text, "# TYPE "+d.Name+" "+d.Type+"\n") {
			t.Errorf("%s is described as a %s and not collected so", d.Name, d.Type)
		}
	}
}

// A server that hangs costs a scrape time, within bounds, and the others nothing.
func TestCollector_StuckServer(t *testing.T) {
	s := source()
	const stuck = "main/stuck"
	at := s.list[0]
	at.ID, at.Device = stuck, "/dev/nbd1"
	gone := s.list[0]
	gone.ID, gone.Device, gone.PID, gone.Phase = "main/gone", "/dev/nbd2", 0, supervisor.Recovering
	s.list = append(s.list, at, gone)
	c := NewCollector(s, "")
	c.patience = 50 * time.Millisecond
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(c)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			for _, label := range m.GetLabel() {
				if label.GetName() == "volume" {
					got[family.GetName()+" "+label.GetValue()] += m.GetGauge().GetValue() + m.GetCounter().GetValue()
				}
			}
		}
	}
	for key, want := range map[string]float64{
		"csi_imgdisk_volume_server_answering main/vol":      1,
		"csi_imgdisk_volume_server_answering " + stuck:      0,
		"csi_imgdisk_volume_serving " + stuck:               1,
		"csi_imgdisk_volume_server_restarts_total " + stuck: 2,
		"csi_imgdisk_volume_server_answering main/gone":     0,
		"csi_imgdisk_volume_serving main/gone":              0,
		"csi_imgdisk_volume_operations_total main/vol":      5,
	} {
		if value, ok := got[key]; !ok || value != want {
			t.Errorf("%s is %v (%t), want %v", key, value, ok, want)
		}
	}
	if _, ok := got["csi_imgdisk_volume_operations_total "+stuck]; ok {
		t.Error("figures of a server that has told none")
	}
}

func TestHandler_SupervisorGone(t *testing.T) {
	s := &fakeSource{err: block.ErrClosed}
	text := scrape(t, s)
	if !strings.Contains(text, "csi_imgdisk_build_info{") || strings.Contains(text, "csi_imgdisk_volumes ") {
		t.Errorf("without a supervisor:\n%s", text)
	}
}

func scrape(t *testing.T, s Source) string {
	t.Helper()
	server := httptest.NewServer(Handler(s, "1.2.3", slog.New(slog.DiscardHandler)))
	defer server.Close()
	return get(t, server.URL)
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", url, resp.Status, err, body)
	}
	return string(body)
}

// The address may be taken for a while, by a supervisor that is being replaced.
func TestListenAndServe_AddressTaken(t *testing.T) {
	taken := httptest.NewServer(http.NotFoundHandler())
	address := taken.Listener.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	var log strings.Builder
	go func() {
		defer close(ended)
		ListenAndServe(ctx, address, Handler(source(), "", slog.New(slog.DiscardHandler)), slog.New(slog.NewTextHandler(&log, nil)))
	}()
	time.Sleep(10 * time.Millisecond) // likely enough to have met the other; right in any case
	taken.Close()
	var text string
	for start := time.Now(); time.Since(start) < time.Minute; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + address + Path)
		if err == nil {
			body, readErr := io.ReadAll(resp.Body)
			resp.Body.Close()
			if text = string(body); readErr == nil && resp.StatusCode == http.StatusOK {
				break
			}
		}
	}
	if !strings.Contains(text, `csi_imgdisk_volumes 1`) {
		t.Errorf("metrics over TCP: %s", text)
	}
	if resp, err := http.Get("http://" + address + "/debug/pprof/"); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("profiles are to be had over TCP: %s", resp.Status)
		}
	}
	cancel()
	<-ended
	if !strings.Contains(log.String(), "metrics are served") {
		t.Errorf("log: %s", log.String())
	}
}

func TestDebugHandler(t *testing.T) {
	server := httptest.NewServer(DebugHandler())
	defer server.Close()
	if text := get(t, server.URL+"/debug/pprof/goroutine?debug=1"); !strings.Contains(text, "goroutine profile") {
		t.Errorf("goroutines: %s", text)
	}
}
