package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
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

// errNotBegun says that a machine ended before it ran anything of ours: the emulator's
// threads now and then trip over a kernel that changes its own code while it starts.
var errNotBegun = errors.New("the machine ended while it started")

// boot runs a machine to its end, and shows and notes what it says. It returns nil if what
// it ran ended well.
func boot(ctx context.Context, k vmkernel.Kernel, files bootFiles, m machine, told *digest) error {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(m.memoryMiB),
		"-display", "none", "-no-reboot", "-nodefaults", "-serial", "stdio",
		"-snapshot", "-drive", "file="+files.disk+",if=virtio,format=raw,cache=unsafe",
		"-kernel", k.Image, "-initrd", files.initramfs,
		"-append", "console=ttyS0 panic=-1 quiet imgdisk.machine="+m.name+" imgdisk.arguments="+strings.Join(m.commandLine(), ","))
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	verdict, hasBegun := "", false
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
			continue
		}
		told.add(line)
		fmt.Printf("[%s %s] %s\n", k.Release, m.name, line)
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("not done in time: %w", ctx.Err())
	case verdict == "0":
		return nil
	case !hasBegun:
		return errors.Join(errNotBegun, err)
	case verdict == "":
		return errors.Join(errors.New("the machine ended without a verdict"), err)
	}
	return fmt.Errorf("failed with exit code %s", verdict)
}
