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
)

// verdictPrefix is what init.sh begins its last line with; the tests' exit code
// follows.
const verdictPrefix = "imgdisk-vm verdict: "

// boot runs a machine to its end and shows what it says. It returns nil if its tests
// passed.
func boot(ctx context.Context, k kernel, initrd, run string, memory int) error {
	args := "console=ttyS0 panic=-1 quiet"
	if run != "" {
		args += " imgdisk.run=" + run
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(memory),
		"-display", "none", "-no-reboot", "-nodefaults", "-serial", "stdio",
		"-kernel", k.image, "-initrd", initrd, "-append", args)
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	verdict := ""
	for lines := bufio.NewScanner(out); lines.Scan(); {
		line := strings.TrimRight(lines.Text(), "\r")
		if _, code, ok := strings.Cut(line, verdictPrefix); ok {
			verdict = code
			continue
		}
		fmt.Printf("[%s] %s\n", k.release, line)
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("not done in time: %w", ctx.Err())
	case verdict == "0":
		return nil
	case verdict == "":
		return errors.Join(errors.New("the machine ended without a verdict"), err)
	}
	return fmt.Errorf("tests failed with exit code %s", verdict)
}
