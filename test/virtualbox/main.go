// Command virtualbox runs this directory's tests against Oracle VirtualBox's own reader
// and writer of disk images: `go run ./test/virtualbox` from the repository's root.
//
//   - install.go: downloads and unpacks Debian's VirtualBox into a cache, once
//   - tree.go: runs its programs there, out of the machine's way
//   - *_test.go: the tests; `go test` alone skips those that need VirtualBox
//
// Nothing is installed into the system and no kernel module is needed. Root is not
// needed either where users may make namespaces.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
)

// treeEnv names the directory of an unpacked VirtualBox to the tests.
const treeEnv = "IMGDISK_VIRTUALBOX"

func main() {
	var in installer
	flag.StringVar(&in.cache, "cache", defaultCache(), "directory for what is downloaded")
	flag.StringVar(&in.mirror, "mirror", "http://deb.debian.org/debian", "where Debian's packages come from")
	flag.StringVar(&in.suite, "suite", "sid", "Debian's suite that has VirtualBox")
	update := flag.Bool("update", false, "download again what is there already")
	run := flag.String("run", ".", "only run the tests that match this, as go test -run does")
	flag.Parse()
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := runTests(ctx, in, *update, *run)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "virtualbox:", err)
		os.Exit(1)
	}
}

// defaultCache is where people's caches are.
func defaultCache() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "csi-imgdisk", "virtualbox")
}

func runTests(ctx context.Context, in installer, update bool, run string) error {
	if _, err := os.Stat("go.mod"); err != nil {
		return fmt.Errorf("run this from the repository's root: %w", err)
	}
	dir, err := in.ensure(ctx, update)
	if err != nil {
		return fmt.Errorf("get VirtualBox: %w", err)
	}
	version, err := tree(dir).manage(ctx, os.TempDir(), "--version")
	if err != nil {
		return err
	}
	fmt.Printf("VirtualBox %s in %s\n", version, dir)
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-v", "-timeout", "20m", "-run", run, "./test/virtualbox")
	cmd.Env = append(os.Environ(), treeEnv+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	return nil
}
