package nbdlocal

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// Other people's clients, which know the protocol better than our own does.

// oracleDevice is a device with data, holes and an odd size, and its export.
func oracleDevice(t *testing.T, name string) (dev *memDevice, uri string) {
	dev = newMemDevice(40*mib + 512*3)
	rnd := testenv.Rand(t)
	for _, at := range []int64{0, 5 * mib, 5*mib + memPage, 17*mib + 4096, dev.size - 5000} {
		data := make([]byte, 5000)
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
		if _, err := dev.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(t.TempDir(), "nbd")
	server := NewServer(dev, Options{Description: "what it is"})
	serveExports(t, exportsOf(t, name, server, failOnClientError(t)), socket)
	return dev, "nbd+unix:///" + name + "?socket=" + socket
}

func failOnClientError(t *testing.T) ExportsOptions {
	return ExportsOptions{ClientError: func(err error) { t.Errorf("server: %v", err) }}
}

func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(testenv.Oracle(t, program), args...)
	cmd.Dir = t.TempDir()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", program, strings.Join(args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

func TestOracle_nbdinfo(t *testing.T) {
	dev, uri := oracleDevice(t, "vol")
	var info struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name        string `json:"export-name"`
			Description string
			Size        int64 `json:"export-size"`
			ReadOnly    bool  `json:"is_read_only"`
			MultiConn   bool  `json:"can_multi_conn"`
			Flush       bool  `json:"can_flush"`
			FUA         bool  `json:"can_fua"`
			Trim        bool  `json:"can_trim"`
			Zero        bool  `json:"can_zero"`
			FastZero    bool  `json:"can_fast_zero"`
			DF          bool  `json:"can_df"`
			Cache       bool  `json:"can_cache"`
			Minimum     int   `json:"block_size_minimum"`
			Preferred   int   `json:"block_size_preferred"`
			Maximum     int   `json:"block_size_maximum"`
			Contexts    []string
		}
	}
	out := run(t, "nbdinfo", "--json", "--list", uri)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(info.Exports) != 1 || info.Protocol != "newstyle-fixed" || !info.Structured {
		t.Fatalf("nbdinfo: %s", out)
	}
	e := info.Exports[0]
	if e.Name != "vol" || e.Size != dev.size || e.Description != "what it is" || !slices.Equal(e.Contexts, []string{"base:allocation", "qemu:allocation-depth"}) {
		t.Errorf("nbdinfo: %s", out)
	}
	if e.ReadOnly || !e.MultiConn || !e.Flush || !e.FUA || !e.Trim || !e.Zero || !e.FastZero || !e.DF || !e.Cache {
		t.Errorf("flags: %s", out)
	}
	if e.Minimum != 1 || e.Preferred != 4096 || e.Maximum != maxPayloadBytes {
		t.Errorf("block sizes: %s", out)
	}
	var extents []struct{ Offset, Length, Type int64 }
	out = run(t, "nbdinfo", "--map", "--json", uri)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	at := int64(0)
	for _, x := range extents {
		if x.Offset != at {
			t.Errorf("map has a gap before %d", x.Offset)
		}
		for off := x.Offset; off < x.Offset+x.Length; off += memPage - off%memPage {
			if dev.allocated(off) != (x.Type == 0) {
				t.Errorf("at %d nbdinfo says type %d", off, x.Type)
			}
		}
		at = x.Offset + x.Length
	}
	if at != dev.size {
		t.Errorf("map ends at %d, want %d", at, dev.size)
	}
}

// TestOracle_nbdinfoDepth: clients learn which layer a piece comes from; recent ones ask
// with extended headers.
func TestOracle_nbdinfoDepth(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "nbd")
	server := NewServer(layeredDevice{newMemDevice(8*memPage + 100)}, Options{})
	serveExports(t, exportsOf(t, "", server, failOnClientError(t)), socket)
	out := run(t, "nbdinfo", "--map=qemu:allocation-depth", "--json", "nbd+unix:///?socket="+socket)
	var extents []struct{ Offset, Length, Type int64 }
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(extents) != 9 {
		t.Fatalf("%d extents, want 9\n%s", len(extents), out)
	}
	for i, x := range extents {
		if want := min(memPage, 8*memPage+100-x.Offset); x.Offset != int64(i)*memPage || x.Length != want || x.Type != int64(i%4) {
			t.Errorf("extent %d: %+v", i, x)
		}
	}
}

func TestOracle_nbdcopy(t *testing.T) {
	dev, uri := oracleDevice(t, "")
	file := filepath.Join(t.TempDir(), "copy")
	run(t, "nbdcopy", uri, file)
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := dev.snapshot(0, int(dev.size))
	if !bytes.Equal(got, want) {
		t.Fatal("the copy differs")
	}
	for _, args := range [][]string{
		{"--connections=4", "--requests=64", "--flush"},
		{"--connections=1", "--request-size=33554432", "--destination-is-zero"},
	} {
		back := newMemDevice(dev.size)
		socket := filepath.Join(t.TempDir(), "back")
		s := serveUnix(t, back, socket)
		run(t, "nbdcopy", append(args, file, "nbd+unix:///?socket="+socket)...)
		if !bytes.Equal(back.snapshot(0, int(back.size)), want) {
			t.Errorf("nbdcopy %v: what was written differs", args)
		}
		if st := s.Stats(); st.Writes == 0 || st.Errors != 0 {
			t.Errorf("nbdcopy %v: %+v", args, st)
		}
	}
	run(t, "nbdcopy", uri, uri) // onto itself, which reads and writes at once
	if !bytes.Equal(dev.snapshot(0, int(dev.size)), want) {
		t.Error("copied onto itself, it differs")
	}
}

func TestOracle_qemuImg(t *testing.T) {
	dev, uri := oracleDevice(t, "vol")
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	out := run(t, "qemu-img", "info", "-f", "raw", "--output=json", uri)
	if err := json.Unmarshal([]byte(out), &info); err != nil || info.Size != dev.size {
		t.Errorf("info: %v\n%s", err, out)
	}
	file := filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(file, dev.snapshot(0, int(dev.size)), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, file)

	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	out = run(t, "qemu-img", "map", "-f", "raw", "--output=json", uri)
	if err := json.Unmarshal([]byte(out), &extents); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, x := range extents {
		if x.Data != dev.allocated(x.Start) || x.Zero == x.Data {
			t.Errorf("map: at %d data=%v zero=%v", x.Start, x.Data, x.Zero)
		}
	}
	if len(extents) < 7 {
		t.Errorf("map: %d extents, want the holes to show\n%s", len(extents), out)
	}

	back := newMemDevice(dev.size)
	socket := filepath.Join(t.TempDir(), "back")
	serveUnix(t, back, socket)
	run(t, "qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", uri, "nbd+unix:///?socket="+socket)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", "nbd+unix:///?socket="+socket, file)
}

func TestOracle_qemuIO(t *testing.T) {
	dev, uri := oracleDevice(t, "")
	out := run(t, "qemu-io", "-f", "raw",
		"-c", "write -P 0x11 0 1M", "-c", "write -P 0x22 513 77", "-c", "read -P 0x22 513 77",
		"-c", "write -z 128k 128k", "-c", "read -P 0 128k 128k",
		"-c", "write -z -u 256k 128k", "-c", "read -P 0 256k 128k",
		"-c", "discard 512k 64k", "-c", "write -f -P 0x33 700k 4k", "-c", "flush",
		"-c", "aio_write -P 0x44 2M 12M", "-c", "aio_write -P 0x55 20M 1M", "-c", "aio_flush",
		"-c", "read -P 0x44 2M 12M", "-c", "read -P 0x55 20M 1M", "-c", "read -P 0x11 600k 100k",
		uri)
	if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if n := dev.flushCount(); n < 2 { // one by the FUA write, one by flush
		t.Errorf("%d flushes, want at least 2", n)
	}
	if dev.allocated(512 << 10) {
		t.Error("discard kept the space")
	}
	out = run(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x44 2M 12M", uri)
	if strings.Contains(out, "failed") {
		t.Errorf("qemu-io:\n%s", out)
	}
}

// TestOracle_fioVerify writes and reads back with several connections at once.
func TestOracle_fioVerify(t *testing.T) {
	dev := newMemDevice(64 * mib)
	socket := filepath.Join(t.TempDir(), "nbd")
	s := serveUnix(t, dev, socket)
	size, loops := "16M", "2"
	if testing.Short() {
		size, loops = "2M", "1"
	}
	out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri=nbd+unix:///?socket="+socket,
		"--rw=randrw", "--bsrange=512-128k", "--bs_unaligned", "--iodepth=32", "--size="+size, "--loops="+loops,
		"--numjobs=4", "--offset_increment=16M", "--group_reporting", "--fsync=5",
		"--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--verify_state_save=0", "--output-format=json")
	var report struct {
		Jobs []struct {
			Error int
			Read  struct {
				Total int64 `json:"total_ios"`
			}
		}
	}
	if err := json.Unmarshal(fioJSON([]byte(out)), &report); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if report.Jobs[0].Error != 0 || report.Jobs[0].Read.Total == 0 {
		t.Errorf("fio: %s", out)
	}
	if st := s.Stats(); st.Errors != 0 || st.Writes == 0 || st.Flushes == 0 {
		t.Errorf("server: %+v", st)
	}
}
