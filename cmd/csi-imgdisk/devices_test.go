package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

func TestDeviceRates(t *testing.T) {
	since := time.Now()
	stats := func(reads uint64, bytes uint64, failed uint64) *supervisor.ServerStats {
		return &supervisor.ServerStats{Since: since, Requests: filter.Figures{Ops: []filter.OpFigures{
			{Op: "read", Bytes: bytes, Latency: filter.Latency{0, 0, reads}, Errors: map[string]uint64{"EIO": failed}},
			{Op: "flush", Latency: append(make(filter.Latency, 20), reads)},
		}}}
	}
	before := deviceSample{since, stats(100, 4096, 1)}
	now := deviceSample{since.Add(2 * time.Second), stats(300, 4096+2048, 4)}
	r := newDeviceRates(before, now)
	if r == nil || r.IOPS != 100 || r.ReadBytes != 1024 || r.WrittenBytes != 0 || r.Errors != 3 || r.P50Micros != 3 {
		t.Errorf("rates: %+v", r)
	}
	if r := newDeviceRates(deviceSample{}, now); r != nil {
		t.Errorf("rates without an earlier sample: %+v", r)
	}
	another := *now.stats
	another.Since = since.Add(time.Second)
	if r := newDeviceRates(before, deviceSample{now.at, &another}); r != nil {
		t.Errorf("rates across two servers: %+v", r)
	}
}

func TestRedrawn(t *testing.T) {
	var out bytes.Buffer
	screen := &redrawn{out: &out, width: func() int { return 5 }}
	for _, text := range []string{"ä long line\nshort\n", "one\n"} {
		if err := screen.show(text); err != nil {
			t.Fatal(err)
		}
	}
	if want := "ä lon\nshort\n\x1b[2A\x1b[Jone\n"; out.String() != want {
		t.Errorf("drawn: %q, want %q", out.String(), want)
	}
}

func TestHumanFigures(t *testing.T) {
	for got, want := range map[string]string{
		humanRate(0): "0", humanRate(9999): "9999", humanRate(123456): "123k", humanRate(1.5e6): "1.5M",
		humanMicros(0): "-", humanMicros(12.34): "12.3µs", humanMicros(12345): "12.3ms", humanMicros(2.5e6): "2.5s",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestDevices_WatchRefusesShortInterval(t *testing.T) {
	r := run(t, "devices", "--watch", "--interval", "1ms", "--run-dir", t.TempDir())
	if r.code != 1 || !strings.Contains(r.stderr, "at least 100ms") {
		t.Errorf("code %d, %s", r.code, r.stderr)
	}
}

// watched is an interval as --watch -o json shows it.
type watched struct {
	Time    time.Time      `json:"time"`
	Devices []deviceStatus `json:"devices"`
}

// TestDevices_WatchAndLimits reads a device at a limit that is set while it is read.
func TestDevices_WatchAndLimits(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	image, runDir := filepath.Join(dir, "x.qcow2"), filepath.Join(dir, "run")
	ok(t, "image", "create", image, "64M")
	device := attachedDevice(t, image, runDir)
	r := run(t, "devices", "limits", device.Device, "--iops", "5", "--run-dir", runDir)
	if r.code != 1 || !strings.Contains(r.stderr, "at least 10") {
		t.Errorf("a limit too low: code %d, %s", r.code, r.stderr)
	}
	limits := decode[deviceLimits](t, ok(t, "devices", "limits", device.Device, "--iops", "50", "--bandwidth", "10Mi", "--run-dir", runDir, "-o", "json"))
	if limits.IOPS != 50 || limits.BytesPerSecond != 10<<20 || limits.Own {
		t.Errorf("limits: %+v", limits)
	}
	limits = decode[deviceLimits](t, ok(t, "devices", "limits", image, "--bandwidth", "0", "--run-dir", runDir, "-o", "json"))
	if limits.IOPS != 50 || limits.BytesPerSecond != 0 {
		t.Errorf("one of two limits taken away: %+v", limits)
	}

	watch := exec.Command(binary, "devices", "--watch", "--interval", "200ms", "--run-dir", runDir, "-o", "json")
	pipe, err := watch.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = watch.Process.Kill(); _ = watch.Wait() }()
	reader := exec.Command("dd", "if="+device.Device, "of=/dev/null", "bs=4k", "iflag=direct", "count=100000")
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Process.Kill(); _ = reader.Wait() }()
	intervals := json.NewDecoder(pipe)
	for start, seen := time.Now(), false; !seen; {
		var interval watched
		if err := intervals.Decode(&interval); err != nil {
			t.Fatal(err)
		}
		if time.Since(start) > time.Minute {
			t.Fatalf("no reads are shown: %+v", interval)
		}
		for _, d := range interval.Devices {
			if d.Rates != nil && d.Rates.IOPS > 0 && d.Rates.ReadBytes > 0 && d.Rates.P99Micros > 0 {
				seen = true
			}
			if d.Totals != nil && d.Totals.Limits != nil && d.Totals.Limits.IOPS != 50 {
				t.Errorf("limits shown: %+v", d.Totals.Limits)
			}
		}
	}
	if err := watch.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for intervals.More() {
		var interval watched
		if err := intervals.Decode(&interval); err != nil {
			t.Fatal(err)
		}
	}
	if err := watch.Wait(); err != nil {
		t.Errorf("interrupted, --watch ends with %v", err)
	}
	limits = decode[deviceLimits](t, ok(t, "devices", "limits", device.Device, "--reset", "--run-dir", runDir, "-o", "json"))
	if limits.IOPS != 0 || !limits.Own {
		t.Errorf("reset: %+v", limits)
	}
	if text := scrape(t, filepath.Join(runDir, "supervisor", "api.sock")); !strings.Contains(text, `csi_imgdisk_volume_operations_total{device="`+device.Device+`",op="read"`) {
		t.Errorf("metrics: %s", text)
	}
	// A server that is stopped is left out, and does not keep the scrape from ending.
	if err := syscall.Kill(device.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	silent := `csi_imgdisk_volume_server_answering{device="` + device.Device + `",transport="` + device.Transport + `",volume="image:` + image + `"} 0`
	var text string
	for start := time.Now(); time.Since(start) < time.Minute && !strings.Contains(text, silent); {
		text = scrape(t, filepath.Join(runDir, "supervisor", "api.sock")) // its threads do not all stop at once
	}
	if err := syscall.Kill(device.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(text, silent) || strings.Contains(text, "csi_imgdisk_volume_operations_total{") {
		t.Errorf("metrics while the server is stopped: %s", text)
	}
	if logs, err := filepath.Glob(filepath.Join(runDir, "supervisor", "attachments", "*", "server.log")); err != nil || len(logs) != 1 {
		t.Errorf("logs: %q, %v", logs, err)
	} else if log, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(log), "msg=limits volume=image:"+image) {
		t.Errorf("log: %s, %v", log, err)
	}
	if out := ok(t, "devices", "--run-dir", runDir); !strings.Contains(out, "IN FLIGHT") || !strings.Contains(out, device.Device) || device.Version == "" || !strings.Contains(out, " "+device.Version+" ") {
		t.Errorf("devices: %s", out)
	}
	if out := ok(t, "devices", "debug", device.Device, "--run-dir", runDir); !strings.Contains(out, "process "+strconv.Itoa(device.PID)) || !strings.Contains(out, "goroutine ") {
		t.Errorf("debug: %s", out)
	}
	_ = reader.Process.Kill()
	_ = reader.Wait()
	detachWhenIdle(t, device.Device, runDir)
}

// scrape gets metrics from a unix socket.
func scrape(t *testing.T, socket string) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
	}}
	resp, err := client.Get("http://supervisor/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", resp.Status, err)
	}
	return string(body)
}
