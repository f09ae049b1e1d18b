// Command vm runs tests in virtual machines with kernels of Debian's: `go run ./test/vm`
// from the repository's root, as root where packages have to be installed.
//
//   - machines.go: which machines there are, and what each runs
//   - disk.go: packs modules, tools and our programs; boot.sh, run.sh: what a machine
//     runs first. Package vmkernel gets kernels, into .cache/vm
//   - qemu.go: boots one and reads the verdict; digest.go: what to repeat of one that failed
//   - guest/: the tests of package attach's transports
//   - volumes/: the tests of whole volumes, with the real program's processes
//
// Some of package supervisor's own tests run, too.
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
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/vmkernel"
)

// config is what to run.
type config struct {
	kernels  []string
	machines *regexp.Regexp
	run      string
	soak     time.Duration // 0: the tests
	limit    time.Duration // for each machine
}

func main() {
	var c config
	kernels := flag.String("kernels", "6.12,6.1", "versions of the kernels to test on, separated by commas")
	only := flag.String("machines", ".", "only the machines whose names match this expression: transports, volumes, memory, stall, supervisor")
	flag.StringVar(&c.run, "run", "", "only run the tests that match this, as go test -run does")
	flag.DurationVar(&c.limit, "timeout", 30*time.Minute, "for each machine")
	flag.DurationVar(&c.soak, "soak", 0, "run the soak for this long instead of the tests; it adds to the timeout")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	c.kernels = strings.Split(*kernels, ",")
	if c.machines, err = regexp.Compile(*only); err == nil {
		err = runAll(ctx, c)
	}
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

// atOnce is how many machines run at the same time. Mostly they wait for timers of the
// kernel's; but when many compute, on few processors, each gets too little for what has to
// be done in time.
const atOnce = 6

// runAll builds what machines need and runs them.
func runAll(ctx context.Context, c config) error {
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
	machines, programs := c.chosen(), filepath.Join(work, "programs")
	if err := build(ctx, programs, machines); err != nil {
		return err
	}
	errs := make([]error, len(c.kernels)*len(machines))
	var running sync.WaitGroup
	places := make(chan struct{}, atOnce)
	for i, version := range c.kernels {
		k, err := vmkernel.Get(ctx, cache, version)
		if err != nil {
			return errors.Join(fmt.Errorf("kernel %s: %w", version, err), waitAll(&running, errs))
		}
		files, err := makeBootFiles(ctx, filepath.Join(work, version), k, programs)
		if err != nil {
			return errors.Join(fmt.Errorf("kernel %s: %w", version, err), waitAll(&running, errs))
		}
		for j, m := range machines {
			if m.once && i > 0 {
				continue
			}
			running.Go(func() {
				places <- struct{}{}
				defer func() { <-places }()
				if err := runOne(ctx, k, files, m, c.limit+c.soak); err != nil {
					errs[i*len(machines)+j] = fmt.Errorf("kernel %s, machine %s: %w", version, m.name, err)
				}
			})
		}
	}
	return waitAll(&running, errs)
}

func waitAll(running *sync.WaitGroup, errs []error) error {
	running.Wait()
	return errors.Join(errs...)
}

// bootTries is how often a machine is started that the emulator fails. The last times it
// emulates in a way that is slower, and has no threads to trip.
const (
	bootTries  = 5
	multiTries = 2
)

func runOne(ctx context.Context, k vmkernel.Kernel, files bootFiles, m machine, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	start := time.Now()
	var told *digest
	err := errEmulator
	for try := 0; try < bootTries && errors.Is(err, errEmulator); try++ {
		threads := "multi"
		if try >= multiTries {
			threads = "single"
		}
		if try > 0 {
			fmt.Printf("[%s %s] %v: once more\n", k.Release, m.name, err)
		}
		told = newDigest()
		err = boot(ctx, k, files, m, threads, told)
	}
	if err != nil {
		return fmt.Errorf("after %v: %w:\n  %s", time.Since(start).Round(time.Second), err, strings.Join(told.lines(), "\n  "))
	}
	fmt.Printf("[%s %s] passed in %v\n", k.Release, m.name, time.Since(start).Round(time.Second))
	return nil
}

// build builds the programs that run in machines.
func build(ctx context.Context, dir string, machines []machine) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	built := map[string]bool{}
	for _, m := range machines {
		for _, name := range m.programs {
			if built[name] {
				continue
			}
			built[name] = true
			how := builds[name]
			args := append([]string{how[0], "-ldflags", "-s -w", "-o", filepath.Join(dir, name)}, how[1:]...)
			if err := command(ctx, "go", args...); err != nil {
				return err
			}
		}
	}
	return nil
}

// bootFiles are what machines with one kernel start from.
type bootFiles struct {
	initramfs string
	disk      string
}

func makeBootFiles(ctx context.Context, dir string, k vmkernel.Kernel, programs string) (bootFiles, error) {
	files := bootFiles{filepath.Join(dir, "initramfs"), filepath.Join(dir, "disk")}
	d, err := newDisk(filepath.Join(dir, "root"))
	if err != nil {
		return files, err
	}
	busybox, err := d.addBusybox(ctx)
	if err != nil {
		return files, err
	}
	for _, name := range guestPrograms {
		if err := d.addProgram(ctx, name); err != nil {
			return files, err
		}
	}
	ours, err := filepath.Glob(filepath.Join(programs, "*"))
	if err != nil {
		return files, err
	}
	for _, path := range ours {
		if err := d.addFile(filepath.Join("bin", filepath.Base(path)), path); err != nil {
			return files, err
		}
	}
	m, err := k.ReadModules(ctx, wantedModules)
	if err != nil {
		return files, err
	}
	if err := d.addModules(m); err != nil {
		return files, err
	}
	if err := d.write(ctx, files.disk); err != nil {
		return files, err
	}
	return files, vmkernel.WriteInitramfs(files.initramfs, m, busybox, bootScript)
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
