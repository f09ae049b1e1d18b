package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// remains are what a demo could leave on this machine.
type remains struct {
	mounts, processes, files []string
}

// survey looks for what a demo that used a temporary directory has left; before are the
// run directories of others.
func survey(t *testing.T, tmp string, before []string) remains {
	t.Helper()
	var r remains
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, tmp) {
			r.mounts = append(r.mounts, line)
		}
	}
	r.processes = processesWith(t, "csi-imgdisk-demo-")
	r.files, err = filepath.Glob(filepath.Join(tmp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range runDirs(t) {
		if !slices.Contains(before, dir) {
			r.files = append(r.files, dir)
		}
	}
	return r
}

// runDirs lists the directories of demos' drivers.
func runDirs(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob("/run/csi-imgdisk-demo-*")
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func startDemo(t *testing.T, tmp string, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(binary, append([]string{"demo"}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Signal(syscall.SIGINT)
			_ = cmd.Wait()
		}
	})
	return cmd, &out
}

func checkNothingLeft(t *testing.T, tmp string, before []string, out string) {
	t.Helper()
	r := survey(t, tmp, before)
	if len(r.mounts)+len(r.processes)+len(r.files) > 0 {
		t.Errorf("the demo left mounts %v, processes %v, files %v\n%s", r.mounts, r.processes, r.files, out)
	}
}

func TestDemo_WorksAndLeavesNothing(t *testing.T) {
	testenv.Root(t)
	tmp, before := t.TempDir(), runDirs(t)
	cmd, out := startDemo(t, tmp)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"Dear reader", "it has the old ledger", "df after", "data@before", "no device, mount, process or file is left"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not say %q:\n%s", want, out)
		}
	}
	t.Log(out)
	checkNothingLeft(t, tmp, before, out.String())
}

func TestDemo_InterruptedAnywhere(t *testing.T) {
	testenv.Root(t)
	r := testenv.Rand(t)
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		tmp, before := t.TempDir(), runDirs(t)
		cmd, out := startDemo(t, tmp)
		after := time.Duration(r.Int64N(int64(4 * time.Second)))
		time.Sleep(after)
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		err := cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 0 && code != 1 {
			t.Errorf("interrupted after %v: %v\n%s", after, err, out)
		}
		t.Logf("interrupted after %v: %s", after, out.String()[max(0, out.Len()-300):])
		checkNothingLeft(t, tmp, before, out.String())
	}
}

func TestDemo_NobodyListens(t *testing.T) {
	testenv.Root(t)
	tmp, before := t.TempDir(), runDirs(t)
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	cmd := exec.Command(binary, "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.Stdout = writer
	if err := cmd.Run(); err != nil {
		t.Errorf("the demo ends with %v", err)
	}
	writer.Close()
	checkNothingLeft(t, tmp, before, "")
}

func TestDemo_OwnImage(t *testing.T) {
	testenv.Root(t)
	qemuImg := testenv.Oracle(t, "qemu-img")
	sfdisk, mkfs := testenv.Oracle(t, "sfdisk"), testenv.Oracle(t, "mkfs.ext4")
	dir, tmp := t.TempDir(), t.TempDir()
	raw, image := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "my disk.vmdk")
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(files, "hello.txt"), []byte("hello"))
	const mib = 1 << 20
	writeFile(t, raw, make([]byte, 40*mib))
	table := exec.Command(sfdisk, "-q", raw)
	table.Stdin = strings.NewReader("label: gpt\n1MiB 32MiB L\n")
	if msg, err := table.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, msg)
	}
	tool(t, mkfs, "-q", "-F", "-E", "offset=1048576", "-d", files, raw, "32M")
	tool(t, qemuImg, "convert", "-f", "raw", "-O", "vmdk", raw, image)
	original, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	before := runDirs(t)
	cmd, out := startDemo(t, tmp, "--image", image)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(out.String(), "hello.txt, sha256 2cf24dba5fb0a30e") {
		t.Errorf("the demo did not read the file:\n%s", out)
	}
	checkNothingLeft(t, tmp, before, out.String())
	if after, err := os.ReadFile(image); err != nil || !bytes.Equal(original, after) {
		t.Errorf("the demo changed the image: %v", err)
	}
}
