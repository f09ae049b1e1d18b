package vmkernel

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Kernel is one that is unpacked.
type Kernel struct {
	Image   string // bootable
	Release string // what uname -r says
	Modules string // directory lib/modules/RELEASE/kernel
}

// Get returns the latest kernel of a version, such as "6.12", that apt knows: from the
// cache or downloaded into it.
func Get(ctx context.Context, cache, version string) (Kernel, error) {
	pkg, err := findPackage(ctx, version)
	if err != nil {
		if k, cacheErr := cachedKernel(cache, version); cacheErr == nil {
			return k, nil // no package lists, but an earlier download
		}
		return Kernel{}, err
	}
	dir := filepath.Join(cache, pkg)
	if _, err := os.Stat(dir); err != nil {
		if err := download(ctx, cache, pkg, dir); err != nil {
			return Kernel{}, err
		}
	}
	return openKernel(dir)
}

// findPackage asks apt, twice if its lists are empty.
func findPackage(ctx context.Context, version string) (string, error) {
	// linux-image-6.12.117+deb12-amd64, linux-image-6.1.0-56-amd64
	pattern := `^linux-image-` + regexp.QuoteMeta(version) + `\.[0-9]+([-+][a-z0-9]+)?-amd64$`
	for try := range 2 {
		if try > 0 {
			if err := command(ctx, "apt-get", "update"); err != nil {
				return "", fmt.Errorf("no kernel %s known to apt: %w", version, err)
			}
		}
		out, err := exec.CommandContext(ctx, "apt-cache", "search", "--names-only", pattern).Output()
		if err != nil {
			return "", fmt.Errorf("apt-cache: %w", err)
		}
		var newest string
		for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
			name, _, _ := strings.Cut(lines.Text(), " ")
			if newest == "" || older(newest, name) {
				newest = name
			}
		}
		if newest != "" {
			return newest, nil
		}
	}
	return "", fmt.Errorf("no package matches %s: Debian 12 with bookworm-security has one", pattern)
}

var digits = regexp.MustCompile(`[0-9]+`)

// older compares the numbers in two packages' names.
func older(a, b string) bool {
	as, bs := digits.FindAllString(a, -1), digits.FindAllString(b, -1)
	for i := range min(len(as), len(bs)) {
		x, _ := strconv.Atoi(as[i])
		y, _ := strconv.Atoi(bs[i])
		if x != y {
			return x < y
		}
	}
	return len(as) < len(bs)
}

// download makes dir from a package, completely or not at all.
func download(ctx context.Context, cache, pkg, dir string) error {
	fmt.Fprintf(os.Stderr, "downloading %s\n", pkg)
	tmp, err := os.MkdirTemp(cache, "download")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	get := exec.CommandContext(ctx, "apt-get", "download", pkg)
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get download %s: %w\n%s", pkg, err, out)
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s left %q", pkg, debs)
	}
	unpacked := filepath.Join(tmp, "unpacked")
	if err := command(ctx, "dpkg-deb", "-x", debs[0], unpacked); err != nil {
		return err
	}
	return os.Rename(unpacked, dir)
}

func openKernel(dir string) (Kernel, error) {
	images, _ := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if len(images) != 1 {
		return Kernel{}, fmt.Errorf("%s/boot holds kernels %q, want one", dir, images)
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return Kernel{Image: images[0], Release: release, Modules: filepath.Join(dir, "lib", "modules", release, "kernel")}, nil
}

// cachedKernel returns the latest of a version that was downloaded earlier.
func cachedKernel(cache, version string) (Kernel, error) {
	dirs, _ := filepath.Glob(filepath.Join(cache, "linux-image-"+version+".*"))
	var newest string
	for _, d := range dirs {
		if newest == "" || older(filepath.Base(newest), filepath.Base(d)) {
			newest = d
		}
	}
	if newest == "" {
		return Kernel{}, fmt.Errorf("no kernel %s in %s", version, cache)
	}
	return openKernel(newest)
}

// command runs a program and tells what it said if it fails.
func command(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}
