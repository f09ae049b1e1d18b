// Command soak lets volumes live under fire for as long as one likes: `make soak
// MINUTES=n`, or `go run ./test/soak -for 10m`, as root, from the repository's root.
//
// Volumes of every format, on every transport that works here, are written, read and
// compared all the time. Meanwhile servers, supervisor and driver are killed, one by one
// and all at once, servers are upgraded and hang, the store's file system stalls, volumes
// grow, are snapshotted and restored, detached and attached again. No request may fail, no
// block may differ, nothing may be left in the end.
//
//   - main.go: flags; soak.go: the run, from a store to the verdict
//   - life.go: what happens to a volume
//   - havoc.go: what happens to all of them
//   - tally.go: what has happened
//   - machine.go: the same in a virtual machine, for transports that this machine lacks
//
// Which things happen is decided by a seed, which is printed; IMGDISK_SEED replays it. When
// they happen depends on the machine.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	var c config
	flag.DurationVar(&c.duration, "for", time.Minute, "how long")
	flag.StringVar(&c.binary, "binary", "bin/csi-imgdisk", "the program")
	flag.StringVar(&c.dir, "dir", os.TempDir(), "directory for the store's file system, on a disk with some GiB free")
	flag.IntVar(&c.volumes, "volumes", 6, "how many volumes live at the same time")
	formats := flag.String("formats", "", "formats of volumes, separated by commas; all if not given")
	transports := flag.String("transports", "", "transports to use, separated by commas; all that work here if not given")
	machine := flag.Bool("vm", false, "do the same at the same time in a virtual machine, over nbd and ublk, too")
	flag.Parse()
	c.formats, c.transports = split(*formats), split(*transports)
	c.out = os.Stdout
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := start(ctx, c, *machine)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

// start runs the soak here, and in a machine if asked to.
func start(ctx context.Context, c config, machine bool) error {
	var err error
	if c.binary, err = filepath.Abs(c.binary); err != nil {
		return err
	}
	if c.seed, err = seed(); err != nil {
		return err
	}
	if machine {
		return withMachine(ctx, c)
	}
	return run(ctx, c)
}

// seed returns the one to replay, or a new one.
func seed() (uint64, error) {
	text := os.Getenv("IMGDISK_SEED")
	if text == "" {
		return uint64(time.Now().UnixNano()), nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("IMGDISK_SEED=%q: want a decimal number", text)
	}
	return n, nil
}
