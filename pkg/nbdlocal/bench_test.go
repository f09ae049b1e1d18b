package nbdlocal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// fileDevice is a raw file as plainly as can be.
type fileDevice struct {
	fd   int
	size int64
}

func openFileDevice(tb testing.TB, path string) *fileDevice {
	tb.Helper()
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = unix.Close(fd) })
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		tb.Fatal(err)
	}
	return &fileDevice{fd: fd, size: st.Size}
}

func (d *fileDevice) ReadAt(p []byte, off int64) (int, error)  { return unix.Pread(d.fd, p, off) }
func (d *fileDevice) WriteAt(p []byte, off int64) (int, error) { return unix.Pwrite(d.fd, p, off) }
func (d *fileDevice) Flush() error                             { return unix.Fdatasync(d.fd) }
func (d *fileDevice) Close() error                             { return nil }

func (d *fileDevice) WriteZeroes(off, n int64, _ block.ZeroFlags) error {
	return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}
func (d *fileDevice) Discard(off, n int64) error { return d.WriteZeroes(off, n, 0) }
func (d *fileDevice) Map(off, n int64) (block.Extent, error) {
	return block.Extent{Off: off, Len: n, State: block.Data, FileOff: off}, nil
}
func (d *fileDevice) Info() block.Info {
	return block.Info{SizeBytes: d.size, LogicalBlockBytes: 512, CanDiscard: true, CanZero: true}
}

// benchLoad is one fio job.
type benchLoad struct {
	name  string
	rw    string
	block string
	depth int
}

var benchLoads = []benchLoad{
	{"4k randread depth 1", "randread", "4k", 1},
	{"4k randwrite depth 1", "randwrite", "4k", 1},
	{"4k randread depth 32", "randread", "4k", 32},
	{"4k randwrite depth 32", "randwrite", "4k", 32},
	{"1M read depth 8", "read", "1M", 8},
	{"1M write depth 8", "write", "1M", 8},
}

// benchServers start a server of the raw file image on a socket, and return its process.
var benchServers = []struct {
	name  string
	start func(t *testing.T, image, socket string) (pid int)
}{
	{"ours", startOurs},
	{"nbdkit", func(t *testing.T, image, socket string) int {
		return startProcess(t, socket, testenv.Oracle(t, "nbdkit"), "-f", "-U", socket, "file", image)
	}},
	{"qemu-nbd", func(t *testing.T, image, socket string) int {
		return startProcess(t, socket, testenv.Oracle(t, "qemu-nbd"), "-f", "raw", "-k", socket, "-t", "-e", "8", image)
	}},
}

// TestCompareSpeed measures this server, nbdkit and qemu-nbd side by side over the same
// file in memory: medians of ratios within a round, since only those mean anything on a
// shared machine; and what an operation costs in processor time, which says more
// when others are busy. IMGDISK_BENCH=1 runs it; IMGDISK_BENCH_SECONDS is the length of
// one run, IMGDISK_BENCH_ROUNDS how many of each.
func TestCompareSpeed(t *testing.T) {
	if os.Getenv("IMGDISK_BENCH") == "" {
		t.Skip("IMGDISK_BENCH=1 runs it")
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(runtime.NumCPU() + 16)) // as doc.go says
	fio := testenv.Oracle(t, "fio")
	seconds, rounds := envInt("IMGDISK_BENCH_SECONDS", 2), envInt("IMGDISK_BENCH_ROUNDS", 5)
	only := os.Getenv("IMGDISK_BENCH_LOAD")
	dir, err := os.MkdirTemp("/dev/shm", "nbdlocal-bench-")
	if err != nil {
		t.Skipf("no memory file system: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, bytes.Repeat([]byte("0123456789abcdef"), 256<<20/16), 0o600); err != nil {
		t.Fatal(err)
	}
	sockets, pids := make([]string, len(benchServers)), make([]int, len(benchServers))
	for i, s := range benchServers {
		sockets[i] = filepath.Join(dir, s.name)
		pids[i] = s.start(t, image, sockets[i])
	}
	for _, load := range benchLoads {
		if !strings.Contains(load.name, only) {
			continue
		}
		rates, costs := make([][]float64, len(benchServers)), make([][]float64, len(benchServers))
		for range rounds {
			for i := range benchServers { // side by side: within a round the others' load is alike
				before := processorTime(t, pids[i])
				rate, count := runFio(t, fio, sockets[i], load, seconds)
				rates[i] = append(rates[i], rate)
				costs[i] = append(costs[i], (processorTime(t, pids[i])-before)*1e6/count)
			}
		}
		line := fmt.Sprintf("%-21s ours %6.0f/s %6.1f us", load.name, median(rates[0]), median(costs[0]))
		for i, s := range benchServers[1:] {
			line += fmt.Sprintf("; %s %6.0f/s %6.1f us: %.2f x, cost %.2f x", s.name, median(rates[i+1]), median(costs[i+1]),
				medianRatio(rates[0], rates[i+1]), medianRatio(costs[0], costs[i+1]))
		}
		t.Log(line)
	}
}

// medianRatio is the median of the ratios within a round.
func medianRatio(a, b []float64) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = a[i] / b[i]
	}
	return median(ratios)
}

// processorTime returns how many seconds a process has used a processor.
func processorTime(tb testing.TB, pid int) float64 {
	tb.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		tb.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))
	user, _ := strconv.Atoi(fields[12])
	system, _ := strconv.Atoi(fields[13])
	return float64(user+system) / 100
}

func startOurs(t *testing.T, image, socket string) int {
	serveUnix(t, openFileDevice(t, image), socket)
	return os.Getpid()
}

// startProcess runs a server until the test ends, and waits for its socket.
func startProcess(tb testing.TB, socket, program string, args ...string) (pid int) {
	tb.Helper()
	cmd := exec.Command(program, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 500 {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return cmd.Process.Pid
		}
		time.Sleep(10 * time.Millisecond)
	}
	tb.Fatalf("%s does not listen on %s", program, socket)
	return 0
}

// runFio returns operations per second, and how many there were.
func runFio(tb testing.TB, fio, socket string, load benchLoad, seconds int) (rate, count float64) {
	tb.Helper()
	out, err := exec.Command(fio, "--name=load", "--ioengine=nbd", "--uri=nbd+unix:///?socket="+socket,
		"--rw="+load.rw, "--bs="+load.block, "--iodepth="+strconv.Itoa(load.depth), "--size=256M",
		"--time_based", "--runtime="+strconv.Itoa(seconds), "--randrepeat=0",
		"--norandommap", "--output-format=json").Output()
	if err != nil {
		tb.Fatalf("fio: %v\n%s", err, out)
	}
	var report struct {
		Jobs []struct {
			Read, Write struct {
				IOPS  float64
				Total float64 `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal(fioJSON(out), &report); err != nil {
		tb.Fatalf("fio's report: %v\n%s", err, out)
	}
	job := report.Jobs[0]
	return job.Read.IOPS + job.Write.IOPS, job.Read.Total + job.Write.Total
}

// fioJSON drops what fio's nbd engine prints around the report.
func fioJSON(out []byte) []byte {
	if i := bytes.IndexByte(out, '{'); i >= 0 {
		out = out[i:]
	}
	if i := bytes.LastIndexByte(out, '}'); i >= 0 {
		out = out[:i+1]
	}
	return out
}

func median(values []float64) float64 {
	values = slices.Sorted(slices.Values(values))
	return values[len(values)/2]
}

func envInt(name string, otherwise int) int {
	if v, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return v
	}
	return otherwise
}
