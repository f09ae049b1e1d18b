// Command vm runs the tests of test/vm/guest in virtual machines with kernels of
// Debian's: `go run ./test/vm` from the repository's root, as root where packages have
// to be installed.
//
//   - kernel.go: finds, downloads and unpacks kernels, into .cache/vm
//   - initramfs.go: packs modules, tools and the test binary
//   - qemu.go: boots one and reads the verdict
//   - guest/: the tests, and init.sh, which starts them
//
// Machines are emulated, not virtualised: stock kernels do not boot under every nested
// hypervisor, and the emulator's slow pace finds races. Figures of speed mean nothing.
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
	"strings"
	"sync"
	"time"
)

func main() {
	kernels := flag.String("kernels", "6.12,6.1", "versions of the kernels to test on, separated by commas")
	run := flag.String("run", "", "only run the tests that match this, as go test -run does")
	limit := flag.Duration("timeout", 8*time.Minute, "for each machine")
	memory := flag.Int("memory", 1536, "MiB of memory of a machine")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt)
	err := runAll(ctx, strings.Split(*kernels, ","), *run, *limit, *memory)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

func runAll(ctx context.Context, versions []string, run string, limit time.Duration, memory int) error {
	cache, err := filepath.Abs(filepath.Join(".cache", "vm"))
	if err != nil {
		return err
	}
	if _, err := os.Stat("go.mod"); err != nil {
		return fmt.Errorf("run this from the repository's root: %w", err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	if err := installTools(ctx); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "imgdisk-vm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	binary := filepath.Join(work, "guest.test")
	if err := command(ctx, "go", "test", "-c", "-o", binary, "./test/vm/guest"); err != nil {
		return fmt.Errorf("build the guest's tests: %w", err)
	}
	// At the same time: mostly they wait for timers of the kernel's.
	errs := make([]error, len(versions))
	var machines sync.WaitGroup
	for i, version := range versions {
		machines.Go(func() {
			if err := runOne(ctx, cache, work, version, binary, run, limit, memory); err != nil {
				errs[i] = fmt.Errorf("kernel %s: %w", version, err)
			}
		})
	}
	machines.Wait()
	return errors.Join(errs...)
}

func runOne(ctx context.Context, cache, work, version, binary, run string, limit time.Duration, memory int) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	k, err := getKernel(ctx, cache, version)
	if err != nil {
		return err
	}
	initrd := filepath.Join(work, version+".cpio")
	if err := writeInitramfs(ctx, initrd, k, binary); err != nil {
		return err
	}
	defer os.Remove(initrd)
	start := time.Now()
	if err := boot(ctx, k, initrd, run, memory); err != nil {
		return fmt.Errorf("after %v: %w", time.Since(start).Round(time.Second), err)
	}
	fmt.Printf("[%s] passed in %v on %s\n", version, time.Since(start).Round(time.Second), k.release)
	return nil
}

// tools are the programs needed here and in the guest, with their Debian packages.
var tools = []struct{ program, pkg string }{
	{"qemu-system-x86_64", "qemu-system-x86"},
	{"busybox", "busybox-static"},
	{"fio", "fio"},
	{"mkfs.ext4", "e2fsprogs"},
}

// installTools installs what is missing, if it can.
func installTools(ctx context.Context) error {
	// A user's PATH lacks the directory where mkfs.ext4 is.
	if err := os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	var missing []string
	for _, t := range tools {
		if _, err := exec.LookPath(t.program); err != nil {
			missing = append(missing, t.pkg)
		}
	}
	if missing == nil {
		return nil
	}
	install := append([]string{"apt-get", "install", "-y", "--no-install-recommends"}, missing...)
	if os.Geteuid() != 0 {
		return fmt.Errorf("missing packages: as root, %s", strings.Join(install, " "))
	}
	if err := command(ctx, install[0], install[1:]...); err == nil {
		return nil
	}
	if err := command(ctx, "apt-get", "update"); err != nil {
		return err
	}
	return command(ctx, install[0], install[1:]...)
}

// command runs a program and shows what it says if it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
