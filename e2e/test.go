package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/install"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
)

// start builds what is missing, brings a cluster up in dir and installs the driver.
func start(ctx context.Context, p paths, dir string) (*cluster.Cluster, error) {
	if err := checkMachine(); err != nil {
		return nil, err
	}
	begun := time.Now()
	// The machines' root file system needs the network most, the parts the processors.
	prepared := make(chan error, 1)
	go func() { prepared <- cluster.Prepare(ctx, p.cache, os.Stderr) }()
	made, err := parts.Build(ctx, p.cache)
	if err := errors.Join(err, <-prepared); err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "%6.1f s  all parts are there\n", time.Since(begun).Seconds())
	var installed error
	c, err := cluster.Up(ctx, cluster.Config{
		Cache: p.cache, Dir: dir, Parts: made, Log: os.Stderr,
		Serving: func(ctx context.Context, c *cluster.Cluster) { installed = install.Chart(ctx, c, made.DriverImage) },
	})
	if err != nil {
		return nil, err
	}
	if installed != nil {
		return c, installed
	}
	fmt.Fprintf(os.Stderr, "%6.1f s  the driver is installed\n", time.Since(begun).Seconds())
	return c, nil
}

// up keeps the cluster, also when the driver did not come up: then it is to be looked at.
func up(ctx context.Context, p paths) error {
	c, err := start(ctx, p, p.kept)
	if c == nil {
		return err
	}
	fmt.Printf("export KUBECONFIG=%s\n", c.Kubeconfig())
	if err != nil {
		return fmt.Errorf("the cluster is up, but: %w", err)
	}
	return nil
}

func down(ctx context.Context, p paths) error {
	return errors.Join(remove(ctx, p.kept), removeLeftovers(ctx, p))
}

// shell opens one on this machine, or on a machine of the cluster's.
func shell(ctx context.Context, p paths, machine []string) error {
	c, err := cluster.Open(p.kept)
	if err != nil {
		return err
	}
	if len(machine) > 0 {
		return machineShell(ctx, c, machine[0])
	}
	program := os.Getenv("SHELL")
	if program == "" {
		program = "/bin/bash"
	}
	cmd := exec.Command(program) // an interrupt is for what runs in it
	cmd.Env = append(os.Environ(),
		"KUBECONFIG="+c.Kubeconfig(), "IMGDISK_E2E="+p.kept, "PATH="+filepath.Dir(c.Kubectl())+":"+os.Getenv("PATH"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

// machineShell opens a shell on a machine of the cluster's, with a terminal if there is one here.
func machineShell(ctx context.Context, c *cluster.Cluster, name string) error {
	if name != cluster.NodeA && name != cluster.NodeB && name != cluster.NFS {
		return fmt.Errorf("no machine is named %q: there are %s, %s and %s", name, cluster.NodeA, cluster.NodeB, cluster.NFS)
	}
	remote := "exec bash"
	if size, err := terminal("size"); err == nil {
		var rows, columns int
		if _, err := fmt.Sscan(size, &rows, &columns); err != nil {
			return fmt.Errorf("read the terminal's size %q: %w", size, err)
		}
		saved, err := terminal("-g")
		if err != nil {
			return err
		}
		if _, err := terminal("raw", "-echo"); err != nil {
			return err
		}
		defer func() { _, _ = terminal(saved) }() // best effort: the user can do it, too
		remote = fmt.Sprintf("TERM=%s exec script -qfc 'stty rows %d columns %d; exec bash -l' /dev/null", os.Getenv("TERM"), rows, columns)
	}
	return c.Machine(name).Stream(ctx, remote, os.Stdin, os.Stdout, os.Stderr)
}

// terminal runs stty on this process's, and returns what it says.
func terminal(args ...string) (string, error) {
	cmd := exec.Command("stty", args...)
	cmd.Stdin = os.Stdin
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// testRun is what command test was asked for.
type testRun struct {
	full bool
	run  string
	keep bool
}

// Limits of all tests together.
const (
	testLimit     = 2 * time.Hour
	fullTestLimit = 12 * time.Hour
)

func (t testRun) do(ctx context.Context, p paths) error {
	if err := removeLeftovers(ctx, p); err != nil {
		return err
	}
	dir := t.dir(p)
	c, err := start(ctx, p, dir)
	if c == nil {
		return err
	}
	if err == nil {
		err = t.tests(ctx, p, dir)
	}
	background := context.WithoutCancel(ctx)
	if err != nil && ctx.Err() == nil {
		collect(background, c)
		if t.keep {
			fmt.Fprintln(os.Stderr, "the cluster is left up: make e2e-shell, make e2e-down")
			return err
		}
	}
	return errors.Join(err, c.Down(background))
}

// dir is where the cluster's files are to be: one that may stay up is where the other commands
// look for it.
func (t testRun) dir(p paths) string {
	if t.keep {
		return p.kept
	}
	return filepath.Join(p.cache, fmt.Sprintf("%s%d", testDirPrefix, os.Getpid()))
}

// testDirPrefix begins the name of a test's cluster; the number of its process follows.
const testDirPrefix = "test-"

// removeLeftovers takes down clusters of tests that were killed before they could.
func removeLeftovers(ctx context.Context, p paths) error {
	dirs, err := filepath.Glob(filepath.Join(p.cache, testDirPrefix+"*"))
	for _, dir := range dirs {
		pid, atoiErr := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), testDirPrefix))
		if atoiErr != nil || syscall.Kill(pid, 0) == nil {
			continue
		}
		err = errors.Join(err, remove(ctx, dir))
	}
	return err
}

// remove takes down the cluster that is in a directory, if one is.
func remove(ctx context.Context, dir string) error {
	c, err := cluster.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return os.RemoveAll(dir) // it has not come to have anything else
	}
	if err != nil {
		return err
	}
	return c.Down(ctx)
}

// tests builds and runs the tests in a cluster.
func (t testRun) tests(ctx context.Context, p paths, dir string) error {
	built, err := os.MkdirTemp("", "imgdisk-e2e-tests-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(built)
	binary := filepath.Join(built, "tests")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", binary, "./tests")
	build.Dir = p.module
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the tests: %w\n%s", err, out)
	}
	limit := testLimit
	if t.full {
		limit = fullTestLimit
	}
	args := []string{"-test.v", "-test.timeout=" + limit.String()}
	if t.run != "" {
		args = append(args, "-test.run="+t.run)
	}
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Dir = filepath.Join(p.module, "tests")
	cmd.Env = append(os.Environ(), "IMGDISK_E2E="+dir)
	if t.full {
		cmd.Env = append(cmd.Env, "IMGDISK_E2E_FULL=1")
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	// Tests that are interrupted clean up first.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tests: %w", err)
	}
	return nil
}

// collect saves what tells why something failed, and shows the most of it.
func collect(ctx context.Context, c *cluster.Cluster) {
	dir, err := os.MkdirTemp("", "imgdisk-e2e-failed-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: no place for logs:", err)
		return
	}
	if err := c.Collect(ctx, dir); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: not all could be collected:", err)
	}
	for _, line := range cluster.Telling(dir) {
		fmt.Fprintln(os.Stderr, "  "+line)
	}
	fmt.Fprintln(os.Stderr, "e2e: logs, events and the state of all objects are in", dir)
}
