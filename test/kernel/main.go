// Command kernel gets a kernel of Debian's, with what package vmkernel knows, for programs of
// other modules:
//
//	go run ./test/kernel -version 6.12 -cache .cache/vm [-init script -initramfs file]
//
// It prints the kernel as JSON. With -init and -initramfs it also packs what the kernel starts from.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/csi-imgdisk/csi-imgdisk/internal/vmkernel"
)

func main() {
	version := flag.String("version", "6.12", "which kernel: the latest of this version")
	cache := flag.String("cache", ".cache/vm", "directory that keeps kernels")
	script := flag.String("init", "", "the first process, a script of busybox's shell, which finds the disk")
	initramfs := flag.String("initramfs", "", "file to write, for -init")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, *version, *cache, *script, *initramfs)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kernel:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, version, cache, script, initramfs string) error {
	if (script == "") != (initramfs == "") {
		return errors.New("-init and -initramfs need each other")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	kernel, err := vmkernel.Get(ctx, cache, version)
	if err != nil {
		return err
	}
	if script != "" {
		if err := pack(ctx, kernel, script, initramfs); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(kernel)
}

// pack writes what the kernel starts from.
func pack(ctx context.Context, kernel vmkernel.Kernel, script, initramfs string) error {
	first, err := os.ReadFile(script)
	if err != nil {
		return err
	}
	path, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	modules, err := kernel.ReadModules(ctx, vmkernel.DiskModules)
	if err != nil {
		return err
	}
	return vmkernel.WriteInitramfs(initramfs, modules, busybox, first)
}
