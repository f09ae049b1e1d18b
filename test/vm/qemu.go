package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/vmkernel"
)

// What run.sh says first, and what it begins its last line with; the exit code follows.
const (
	begun         = "imgdisk-vm begins"
	verdictPrefix = "imgdisk-vm verdict: "
)

// maxLineBytes bounds a line of what a machine says.
const maxLineBytes = 16 << 20

// errEmulator says that a machine is to be started again: it ended before it ran anything
// of ours, or by what is the emulator's doing. Its threads now and then trip over a kernel
// that changes its own code, mostly while it starts.
var errEmulator = errors.New("the emulator failed")

// emulatorFault is what a kernel says when it has run an instruction that it had put there
// for a moment, and taken away again.
var emulatorFault = regexp.MustCompile(`Oops: int3|\bint3: 0000 \[`)

// bootOptions are the kernel's: any fault ends the machine, and a timer that comes late,
// because this machine is busy, is a timer all the same.
const bootOptions = "console=ttyS0 panic=-1 oops=panic no_timer_check quiet mitigations=off"

// cpu is an emulated processor without what costs an emulator the most: page tables of five
// levels, instructions that copy and clear memory byte by byte, and bits that have it tell
// user's from kernel's pages at each access.
const cpu = "max,la57=off,erms=off,smap=off,smep=off"

// bootPatience is how long a machine may take to run something of ours.
const bootPatience = 6 * time.Minute

// boot runs a machine to its end, and shows and notes what it says. It returns nil if what
// it ran ended well. Each of its processors is emulated by a thread of its own, with threads
// "multi", or all by one, with "single".
func boot(ctx context.Context, k vmkernel.Kernel, files bootFiles, m machine, threads string, told *digest) error {
	running, end := context.WithCancel(ctx)
	defer end()
	starting := time.AfterFunc(bootPatience, end)
	cmd := exec.CommandContext(running, "qemu-system-x86_64",
		"-accel", "tcg,thread="+threads, "-cpu", cpu, "-smp", "2", "-m", strconv.Itoa(m.memoryMiB),
		"-display", "none", "-no-reboot", "-nodefaults", "-serial", "stdio",
		"-snapshot", "-drive", "file="+files.disk+",if=virtio,format=raw,cache=unsafe",
		"-kernel", k.Image, "-initrd", files.initramfs,
		"-append", bootOptions+" imgdisk.machine="+m.name+" imgdisk.arguments="+strings.Join(m.commandLine(), ","))
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	verdict, hasBegun, faulty := "", false, false
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, maxLineBytes)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if _, code, ok := strings.Cut(line, verdictPrefix); ok {
			verdict = code
			continue
		}
		if strings.HasSuffix(line, begun) {
			hasBegun = true
			starting.Stop()
			continue
		}
		faulty = faulty || emulatorFault.MatchString(line)
		told.add(line)
		fmt.Printf("[%s %s] %s\n", k.Release, m.name, line)
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("not done in time: %w", ctx.Err())
	case verdict == "0":
		return nil
	case !hasBegun, faulty:
		return errors.Join(errEmulator, err)
	case verdict == "":
		return errors.Join(errors.New("the machine ended without a verdict"), err)
	}
	return fmt.Errorf("failed with exit code %s", verdict)
}
