package cluster

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
)

//go:embed guest
var guest embed.FS

// kernelVersion is of the kernel that machines run. It has nbd and ublk.
const kernelVersion = "6.12"

// suite is the release of Debian that machines run.
const suite = "bookworm"

// packages are what machines have beside what every Debian has.
var packages = []string{
	"containerd", "crun", "containernetworking-plugins", "conntrack", "iptables", "iproute2", "kmod", "udev",
	"e2fsprogs", "xfsprogs", "btrfs-progs", "nfs-common", "nfs-kernel-server", "rpcbind", "procps", "psmisc", "fdisk",
}

// Files of cached directories.
const (
	treeDir       = "tree"
	rootFile      = "root.img"
	initramfsFile = "initramfs"
	clusterFile   = "cluster.img"
)

// Sizes of file systems. Their files are sparse.
const (
	rootSize    = "10g"
	clusterSize = "16g"
)

// base is what all machines of all clusters start from. Its files are cached.
type base struct {
	Kernel    string
	Initramfs string
	Root      string // the disk with the root file system
	Tree      string // the directory that it was made from
}

// Prepare makes what Up needs beside the parts, if it is not in the cache: so it can be made
// while the parts are. Several programs may call it at the same time.
func Prepare(ctx context.Context, cache string, log io.Writer) error {
	_, err := prepareBase(ctx, cache, newSteps(log))
	return err
}

// prepareBase returns the base, which it makes if it is not cached.
func prepareBase(ctx context.Context, cache string, log *steps) (base, error) {
	unlock, err := lockCache(ctx, cache)
	if err != nil {
		return base{}, err
	}
	defer unlock()
	k, err := getKernel(ctx, cache)
	if err != nil {
		return base{}, err
	}
	boot, err := guest.ReadFile("guest/boot.sh")
	if err != nil {
		return base{}, err
	}
	key := digest("1", suite, rootSize, strings.Join(packages, " "), k.Release, string(boot))
	dir, err := cached(ctx, filepath.Join(cache, "machines"), "base-"+key, func(ctx context.Context, dir string) error {
		log.say("making the machines' root file system")
		if err := makeBase(ctx, cache, dir, k, boot); err != nil {
			return err
		}
		log.done("the machines' root file system is made")
		return nil
	})
	if err != nil {
		return base{}, fmt.Errorf("make the machines' root file system: %w", err)
	}
	return base{
		k.Image, filepath.Join(dir, initramfsFile), filepath.Join(dir, rootFile), filepath.Join(dir, treeDir),
	}, nil
}

// kernel is one that is unpacked, as command test/kernel of the driver's module prints it: that
// module's dependencies are not those of Kubernetes, so this one does not have it as one.
type kernel struct {
	Image   string // bootable
	Release string // what uname -r says
	Modules string // directory lib/modules/RELEASE/kernel
}

// getKernel gets the machines' kernel from the cache that command test/vm uses, too. More
// arguments are for command test/kernel.
func getKernel(ctx context.Context, cache string, args ...string) (kernel, error) {
	module, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return kernel{}, fmt.Errorf("go env GOMOD: %w", err)
	}
	repository := filepath.Dir(filepath.Dir(string(module)))
	cmd := exec.CommandContext(ctx, "go", append([]string{"run", "./test/kernel",
		"-version", kernelVersion, "-cache", filepath.Join(filepath.Dir(cache), "vm")}, args...)...)
	cmd.Dir = repository
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return kernel{}, fmt.Errorf("get kernel %s: %w", kernelVersion, err)
	}
	var k kernel
	return k, json.Unmarshal(out, &k)
}

// makeBase makes a base's files in a directory.
func makeBase(ctx context.Context, cache, dir string, k kernel, boot []byte) error {
	script := filepath.Join(dir, "boot.sh")
	if err := os.WriteFile(script, boot, 0o600); err != nil {
		return err
	}
	if _, err := getKernel(ctx, cache, "-init", script, "-initramfs", filepath.Join(dir, initramfsFile)); err != nil {
		return err
	}
	tree := filepath.Join(dir, treeDir)
	if err := command(ctx, "debootstrap", "--variant=minbase", "--include="+strings.Join(packages, ","), suite, tree); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(tree, "var/cache/apt/archives")); err != nil {
		return err
	}
	modules := filepath.Join(tree, "lib", "modules")
	if err := os.MkdirAll(modules, 0o755); err != nil {
		return err
	}
	if err := command(ctx, "cp", "-a", filepath.Dir(k.Modules), modules); err != nil {
		return err
	}
	if err := command(ctx, "chroot", tree, "depmod", k.Release); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(tree, clusterDir), 0o755); err != nil {
		return err
	}
	return makeFileSystem(ctx, tree, filepath.Join(dir, rootFile), rootSize)
}

// makeFileSystem makes one that holds what is in a directory.
func makeFileSystem(ctx context.Context, tree, file, size string) error {
	return command(ctx, "mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", "-d", tree, file, size)
}

// clusterDir is where machines mount the disk with what is of this repository: programs and
// images. It is made anew with each change of them, the root file system hardly ever.
const clusterDir = "cluster"

// prepareClusterDisk returns that disk, which it makes if it is not cached.
func prepareClusterDisk(ctx context.Context, cache string, b base, p *parts.Parts, log *steps) (string, error) {
	unlock, err := lockCache(ctx, cache)
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := os.MkdirAll(filepath.Join(cache, "machines"), 0o755); err != nil {
		return "", err
	}
	agent := filepath.Join(cache, "machines", "agent")
	if err := buildAgent(ctx, agent); err != nil {
		return "", err
	}
	key, err := clusterDiskKey(b, p, agent)
	if err != nil {
		return "", err
	}
	dir, err := cached(ctx, filepath.Join(cache, "machines"), "cluster-"+key, func(ctx context.Context, dir string) error {
		log.say("importing %d archives of images", len(p.Images))
		if err := makeClusterDisk(ctx, dir, b, p, agent); err != nil {
			return err
		}
		log.done("the images are imported")
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("make the machines' disk of images: %w", err)
	}
	return filepath.Join(dir, clusterFile), nil
}

// clusterDiskKey is a digest of what the disk is made of.
func clusterDiskKey(b base, p *parts.Parts, agent string) (string, error) {
	texts := []string{"1", filepath.Base(filepath.Dir(b.Root)), clusterSize}
	err := fs.WalkDir(guest, "guest", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := guest.ReadFile(path)
		texts = append(texts, path, string(content))
		return err
	})
	if err != nil {
		return "", err
	}
	for _, path := range append([]string{agent, filepath.Join(p.Bin, "kubelet")}, p.Images...) {
		sum, err := fileDigest(path)
		if err != nil {
			return "", err
		}
		texts = append(texts, sum)
	}
	return digest(texts...), nil
}

// buildAgent builds the program that runs commands on machines.
func buildAgent(ctx context.Context, file string) error {
	return command(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", file, "github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/agent")
}

// makeClusterDisk makes the disk's file in a directory.
func makeClusterDisk(ctx context.Context, dir string, b base, p *parts.Parts, agent string) error {
	tree := filepath.Join(dir, "disk")
	for _, name := range []string{"bin", "etc", "images"} {
		if err := os.MkdirAll(filepath.Join(tree, name), 0o755); err != nil {
			return err
		}
	}
	err := errors.Join(
		copyFile(filepath.Join(tree, "bin", "agent"), agent),
		copyFile(filepath.Join(tree, "bin", "kubelet"), filepath.Join(p.Bin, "kubelet")),
	)
	for name, target := range map[string]string{
		"init": "init", "init.node": "init.node", "init.nfs": "init.nfs", "nfs": "bin/nfs",
		"containerd.toml": "etc/containerd.toml", "cni.conflist": "etc/cni.conflist", "kubelet.yaml": "etc/kubelet.yaml",
	} {
		content, readErr := guest.ReadFile("guest/" + name)
		err = errors.Join(err, readErr, os.WriteFile(filepath.Join(tree, target), content, 0o755))
	}
	for i, image := range p.Images {
		err = errors.Join(err, os.Link(image, filepath.Join(tree, "images", fmt.Sprintf("%02d.tar", i))))
	}
	if err != nil {
		return err
	}
	if err := importImages(ctx, dir, b.Tree, tree); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(tree, "images")); err != nil {
		return err
	}
	if err := makeFileSystem(ctx, tree, filepath.Join(dir, clusterFile), clusterSize); err != nil {
		return err
	}
	return os.RemoveAll(tree)
}

// importImages makes a containerd's directory with images in the tree of a disk.
func importImages(ctx context.Context, dir, root, tree string) error {
	text, err := guest.ReadFile("guest/import.sh")
	if err != nil {
		return err
	}
	script := filepath.Join(dir, "import.sh")
	if err := os.WriteFile(script, text, 0o600); err != nil {
		return err
	}
	return command(ctx, "unshare", "--mount", "--propagation", "private", "--pid", "--kill-child", "--fork",
		"/bin/sh", script, root, tree)
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// keepCached is how long what was not used stays in the cache.
const keepCached = 7 * 24 * time.Hour

// cached returns a directory below parent, which it makes, completely or not at all, if it is
// not there. What has another name and the same beginning goes when it was not used for long.
func cached(ctx context.Context, parent, name string, fill func(ctx context.Context, dir string) error) (string, error) {
	dir := filepath.Join(parent, name)
	now := time.Now()
	if os.Chtimes(dir, now, now) == nil {
		return dir, nil
	}
	removeStale(parent, name)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(parent, "unfinished-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	if err := fill(ctx, tmp); err != nil {
		return "", err
	}
	return dir, os.Rename(tmp, dir)
}

func removeStale(parent, name string) {
	kind, _, _ := strings.Cut(name, "-")
	for _, pattern := range []string{kind + "-*", "unfinished-*"} {
		old, _ := filepath.Glob(filepath.Join(parent, pattern))
		for _, dir := range old {
			if info, err := os.Stat(dir); err == nil && time.Since(info.ModTime()) > keepCached {
				os.RemoveAll(dir)
			}
		}
	}
}

// lockCache waits for other programs that work on the cache.
func lockCache(ctx context.Context, cache string) (unlock func(), err error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(cache, "machines.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", file.Name(), err)
		}
		if err := sleep(ctx, pollInterval); err != nil {
			file.Close()
			return nil, err
		}
	}
}

// digest identifies texts.
func digest(texts ...string) string {
	h := sha256.New()
	for _, text := range texts {
		fmt.Fprintf(h, "%d:%s", len(text), text)
	}
	return hex.EncodeToString(h.Sum(nil))[:16]
}

func fileDigest(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	h := sha256.New()
	if _, err := io.Copy(h, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
