package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// installer gets Debian's VirtualBox with apt, in a world of apt's own: neither the
// system's packages nor its lists of packages are looked at or changed.
type installer struct {
	cache  string // may hold an earlier run's tree
	mirror string
	suite  string
}

// keyring has the keys that the packages' lists are signed with.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// ensure returns the directory of the unpacked tree.
func (in installer) ensure(ctx context.Context, update bool) (string, error) {
	dir := filepath.Join(in.cache, "root")
	if _, err := os.Stat(dir); err == nil && !update {
		return dir, nil
	}
	if runtime.GOARCH != "amd64" {
		return "", fmt.Errorf("it is packaged for amd64, not for %s", runtime.GOARCH)
	}
	for _, tool := range []string{"apt-get", "dpkg-deb", "unshare"} {
		if _, err := exec.LookPath(tool); err != nil {
			return "", err
		}
	}
	if _, err := os.Stat(keyring); err != nil {
		return "", fmt.Errorf("install the package debian-archive-keyring: %w", err)
	}
	if err := os.MkdirAll(in.cache, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(in.cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	fmt.Printf("downloading VirtualBox from %s, suite %s\n", in.mirror, in.suite)
	fresh := filepath.Join(work, "root")
	if err := in.unpack(ctx, work, fresh); err != nil {
		return "", err
	}
	return dir, replace(dir, fresh, filepath.Join(work, "old"))
}

// replace puts a complete directory in the place of an older one, if there is one.
func replace(dir, fresh, old string) error {
	if err := os.Rename(dir, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Rename(fresh, dir)
}

// unpack downloads the program and its libraries into work and unpacks them into root.
func (in installer) unpack(ctx context.Context, work, root string) error {
	a, err := in.newApt(work)
	if err != nil {
		return err
	}
	if _, err := a.run(ctx, "apt-get", "-qq", "update"); err != nil {
		return err
	}
	if _, err := a.run(ctx, "apt-get", "-qq", "download", "virtualbox"); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(work, "virtualbox_*.deb"))
	if err != nil || len(found) != 1 {
		return fmt.Errorf("apt-get downloaded %q: want one package: %w", found, errors.Join(err, fs.ErrNotExist))
	}
	depends, err := a.run(ctx, "dpkg-deb", "-f", found[0], "Depends")
	if err != nil {
		return err
	}
	install := append([]string{"-qq", "--yes", "--download-only", "install"}, libraries(depends)...)
	if _, err := a.run(ctx, "apt-get", install...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(a.archives(), "*.deb"))
	if err != nil {
		return err
	}
	if err := makeRoot(root); err != nil {
		return err
	}
	for _, deb := range append(found, debs...) {
		if _, err := a.run(ctx, "dpkg-deb", "-x", deb, root); err != nil {
			return err
		}
	}
	return nil
}

// makeRoot makes what packages expect of a system, and where things are mounted.
func makeRoot(root string) error {
	for _, dir := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "dev", "tmp", "work"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.Symlink(filepath.Join("usr", dir), filepath.Join(root, dir)); err != nil {
			return err
		}
	}
	return nil
}

// notNeeded are libraries for screens, sound and the like: no program we run loads them.
var notNeeded = regexp.MustCompile(`^lib(gl1|sdl|x11|xt6|vnc|tpms|gsoap|jpeg)`)

// libraries returns the packages of libraries in a package's field Depends.
func libraries(depends string) []string {
	var names []string
	for entry := range strings.SplitSeq(depends, ",") {
		first, _, _ := strings.Cut(entry, "|") // of alternatives
		fields := strings.Fields(first)
		if len(fields) == 0 {
			continue
		}
		name, _, _ := strings.Cut(fields[0], ":")
		isLibrary := strings.HasPrefix(name, "lib") || name == "zlib1g"
		if isLibrary && !notNeeded.MatchString(name) && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// apt runs apt's programs with a configuration of its own.
type apt struct{ dir string }

// aptConfig keeps apt away from everything outside DIR. When a list of packages expires
// does not matter, unlike who signed it: mirrors that stand still are as good here.
const aptConfig = `
Dir "DIR";
Dir::State "DIR";
Dir::State::lists "DIR/lists";
Dir::State::status "DIR/status";
Dir::Cache "DIR/cache";
Dir::Etc "DIR/etc";
Dir::Etc::sourcelist "DIR/sources.list";
APT::Sandbox::User "root";
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
Acquire::Retries "3";
`

func (in installer) newApt(work string) (*apt, error) {
	a := &apt{dir: work}
	for _, dir := range []string{"lists/partial", "cache/archives/partial", "etc/apt.conf.d", "etc/sources.list.d", "etc/preferences.d", "etc/trusted.gpg.d"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			return nil, err
		}
	}
	for name, content := range map[string]string{
		"apt.conf":     strings.ReplaceAll(aptConfig, "DIR", work),
		"status":       "", // nothing is installed in this world
		"sources.list": fmt.Sprintf("deb [arch=amd64 signed-by=%s] %s %s main contrib\n", keyring, in.mirror, in.suite),
	} {
		if err := os.WriteFile(filepath.Join(work, name), []byte(content), 0o644); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (a *apt) archives() string { return filepath.Join(a.dir, "cache", "archives") }

// run runs a program in apt's directory and returns what it prints.
func (a *apt) run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}
