// Command e2e runs a Kubernetes cluster on this machine, with the driver in it, and the tests
// that need one. As root, from the repository: `go -C e2e run . test`, or `make e2e`.
//
//	up      brings a cluster up and keeps it, with the driver installed
//	shell   opens a shell with kubectl for it; shell MACHINE: one on node-a, node-b or nfs
//	down    takes it down
//	test    brings one up of its own, runs the tests, takes it down
//
// Packages: parts builds programs and images, cluster runs them, install installs the chart,
// tests are the tests, the last of which runs Kubernetes's own (suite). What takes long is kept in .cache/e2e.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const usage = `usage: e2e COMMAND
  up                   bring a cluster up and keep it, with the driver installed
  shell [MACHINE]      open a shell with kubectl for the cluster that is kept up, or one on a machine
  down                 take it down
  test [-full] [-run REGEXP] [-keep]
                       bring up a cluster, run the tests in it, take it down`

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:])
	cancel()
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(os.Args) > 1 && os.Args[1] == "shell" {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("no command\n%s", usage)
	}
	// A user's PATH lacks the directories of ip, mkfs.ext4 and debootstrap.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	p, err := findPaths(ctx)
	if err != nil {
		return err
	}
	switch command, rest := args[0], args[1:]; {
	case command == "up" && len(rest) == 0:
		return up(ctx, p)
	case command == "shell" && len(rest) < 2:
		return shell(ctx, p, rest)
	case command == "down" && len(rest) == 0:
		return down(ctx, p)
	case command == "test":
		return parseTest(ctx, p, rest)
	}
	return fmt.Errorf("unknown command %q\n%s", strings.Join(args, " "), usage)
}

// paths are where things are in the repository.
type paths struct {
	module string // directory of this module
	cache  string
	kept   string // the cluster that is kept up
}

func findPaths(ctx context.Context) (paths, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return paths{}, fmt.Errorf("go env GOMOD: %w", err)
	}
	module := filepath.Dir(strings.TrimSpace(string(out)))
	cache := filepath.Join(filepath.Dir(module), ".cache", "e2e")
	return paths{module, cache, filepath.Join(cache, "up")}, nil
}

// needed are programs of Debian's packages; hack/install-deps.sh installs them.
var needed = []string{
	"qemu-system-x86_64", "qemu-img", "debootstrap", "ip", "nsenter", "unshare", "mkfs.ext4", "busybox", "etcd", "apt-get",
}

// checkMachine tells before anything is built that it would be in vain.
func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root: for a network namespace, tap devices and mounts")
	}
	missing := slices.DeleteFunc(slices.Clone(needed), func(program string) bool {
		_, err := exec.LookPath(program)
		return err == nil
	})
	if len(missing) > 0 {
		return fmt.Errorf("missing programs: %s: hack/install-deps.sh e2e installs them", strings.Join(missing, ", "))
	}
	return nil
}

func parseTest(ctx context.Context, p paths, args []string) error {
	var t testRun
	flags := flag.NewFlagSet("test", flag.ContinueOnError)
	flags.BoolVar(&t.full, "full", false, "run all of Kubernetes's own storage suite, not only what touches each capability once")
	flags.StringVar(&t.run, "run", "", "only run the tests that match, as go test -run does")
	flags.BoolVar(&t.keep, "keep", false, "leave the cluster up when a test failed; e2e down takes it down")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return t.do(ctx, p)
}
