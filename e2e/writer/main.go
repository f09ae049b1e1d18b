// Command writer writes to a volume for as long as it is let, and checks all of it: what it
// reads is what it wrote last, nothing that it had flushed is lost, and nobody else writes.
//
//	writer -path /dev/volume -blocks 4096
//	writer -path /data/file -blocks 4096 -run 2 -flushed 71234
//
// # What is written
//
// Blocks of 4 KiB, past the page cache, each with its sequence number, the number of the run
// that wrote it and a checksum of all. Sequence number s goes to block place(s): every pass
// over the volume writes each block once, in a scattered order. After some writes it flushes,
// and only then prints the sequence number up to which everything is flushed:
//
//	flushed 71234 at 1790000000123 longest 17     (milliseconds since 1970; of one request since the line before)
//
// Those lines are what survives: in the pod's log, or wherever somebody read them.
//
// # What is checked
//
// A run begins by reading every block. With -flushed N, each has to hold a whole block of an
// earlier run: the last one that was written there up to N, or a later one, which had been
// written without anybody being told. Anything else, such as an older block, half a block or
// another's, is an error: "lost" or "corrupt". Of the writes that nobody was told of, any may be
// missing, also some before others that are there: the run begins by writing those again. From
// then on it knows what is in each block. It reads blocks as it goes, and all of them when it is told to end (SIGTERM): a
// block that differs from what this run found or wrote was written by somebody else.
//
// Exit status: 0 ended when told to, everything right; 3 contents are wrong; 4 a request
// failed.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	exitWrong  = 3
	exitFailed = 4
)

func main() {
	var c config
	flag.String("name", "", "tells one writer on a machine from another; not looked at")
	flag.StringVar(&c.path, "path", "", "block device, or file, which is made if it does not exist")
	flag.Uint64Var(&c.blocks, "blocks", 4096, "blocks of 4 KiB to write to, from the beginning; a power of two")
	flag.Uint64Var(&c.run, "run", 1, "number of this run; each run on the same volume has a greater one")
	flag.Uint64Var(&c.flushed, "flushed", 0, "what an earlier run printed as flushed; 0: nothing is known to be there")
	flag.IntVar(&c.batch, "batch", 16, "writes between flushes")
	flag.DurationVar(&c.rest, "rest", 0, "how long to wait after each flush, so that others get something done, too")
	flag.DurationVar(&c.every, "print", 200*time.Millisecond, "how often to print what is flushed")
	verifyOnly := flag.Bool("verify", false, "read and check everything, write nothing")
	flag.Parse()

	var stop atomic.Bool
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	go func() {
		<-signals
		stop.Store(true)
	}()
	err := run(c, *verifyOnly, stop.Load)
	switch {
	case err == nil:
	case errors.Is(err, errWrong):
		fmt.Println("wrong:", err)
		os.Exit(exitWrong)
	default:
		fmt.Println("failed:", err)
		os.Exit(exitFailed)
	}
}

func run(c config, verifyOnly bool, stop func() bool) error {
	w, err := open(c)
	if err != nil {
		return err
	}
	if err := w.readAll(w.adopt); err != nil {
		return errors.Join(err, w.close())
	}
	fmt.Printf("found %d of %d blocks written, up to %d\n", w.found, c.blocks, w.next-1)
	if !verifyOnly {
		if err := w.fillGaps(); err != nil {
			return errors.Join(err, w.close())
		}
	}
	for !verifyOnly && !stop() {
		if err := w.round(); err != nil {
			return errors.Join(err, w.close())
		}
	}
	if err := w.readAll(w.compare); err != nil {
		return errors.Join(err, w.close())
	}
	if err := w.close(); err != nil {
		return err
	}
	w.print()
	fmt.Printf("right: %d blocks as they should be, longest request %d ms\n", c.blocks, w.longestEver.Milliseconds())
	return nil
}
