package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// load is what fio does.
type load struct {
	mode       string
	blockBytes int64
	depth      int
	sizeBytes  int64         // of the part of the disk that is used
	totalBytes int64         // to read or write; 0: as much as there is time for
	duration   time.Duration // at most, or, with totalBytes 0, exactly; 0: until all is done
}

// onServer is how fio reaches a server that listens on a socket, onDevice how it reaches a
// block device, past the page cache.
func onServer(socket string) []string {
	return []string{"--ioengine=nbd", "--uri=nbd+unix:///?socket=" + socket}
}

func onDevice(path string) []string {
	return []string{"--ioengine=libaio", "--direct=1", "--filename=" + path}
}

// args are fio's, but for those of onServer or onDevice.
func (l *load) args() []string {
	args := []string{
		"--name=bench", "--rw=" + l.mode, fmt.Sprintf("--bs=%d", l.blockBytes), fmt.Sprintf("--iodepth=%d", l.depth),
		fmt.Sprintf("--size=%d", l.sizeBytes), "--norandommap", "--randrepeat=0", "--output-format=json",
	}
	if l.duration > 0 {
		args = append(args, "--runtime="+strconv.FormatInt(l.duration.Milliseconds(), 10)+"ms")
	}
	if l.totalBytes > 0 {
		return append(args, fmt.Sprintf("--io_size=%d", l.totalBytes))
	}
	if l.duration > 0 {
		args = append(args, "--time_based")
	}
	return args
}

// rate is what fio measured.
type rate struct {
	opsPerSecond   float64
	bytesPerSecond float64
	operations     int64
}

func (r rate) in(unit string) float64 {
	if unit == mibPerSecond {
		return r.bytesPerSecond / float64(mib1)
	}
	return r.opsPerSecond
}

// runFio runs a load on what onServer or onDevice says.
func runFio(ctx context.Context, on []string, l load) (rate, error) {
	cmd := exec.CommandContext(ctx, "fio", append(l.args(), on...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return rate{}, fmt.Errorf("fio --rw=%s: %w: %s", l.mode, err, lastLines(stderr.String()+stdout.String()))
	}
	return parseFio(stdout.String())
}

// parseFio reads fio's JSON, which engines may precede with lines of their own.
func parseFio(text string) (rate, error) {
	start := strings.Index(text, "{")
	if start < 0 {
		return rate{}, fmt.Errorf("fio printed no figures: %s", lastLines(text))
	}
	type side struct {
		Bytes   int64   `json:"io_bytes"`
		Rate    float64 `json:"bw_bytes"`
		OpsRate float64 `json:"iops"`
		Ops     int64   `json:"total_ios"`
	}
	var report struct {
		Jobs []struct {
			Error int  `json:"error"`
			Read  side `json:"read"`
			Write side `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal([]byte(text[start:]), &report); err != nil {
		return rate{}, fmt.Errorf("fio's figures: %w", err)
	}
	if len(report.Jobs) != 1 {
		return rate{}, fmt.Errorf("fio's figures: %d jobs, want 1", len(report.Jobs))
	}
	job := report.Jobs[0]
	if job.Error != 0 {
		return rate{}, fmt.Errorf("fio: error %d", job.Error)
	}
	done := job.Read
	if done.Bytes == 0 {
		done = job.Write
	}
	if done.Bytes == 0 {
		return rate{}, fmt.Errorf("fio read and wrote nothing")
	}
	return rate{opsPerSecond: done.OpsRate, bytesPerSecond: done.Rate, operations: done.Ops}, nil
}

// lastLines is the end of a program's output, for error messages.
func lastLines(text string) string {
	const most = 500
	text = strings.TrimSpace(text)
	return text[max(0, len(text)-most):]
}
