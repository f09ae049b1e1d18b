package parts

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// goPrograms are main packages that are built in one go.
type goPrograms struct {
	name     string
	dir      string   // the module's, from the repository's root
	packages []string // import paths or, with ./ in front, directories
	version  string   // passed to the linker as versionIn
	// versionIn are variables that are to have the version.
	versionIn []string
	// sources are directories, from the repository's root, that the packages are made of,
	// besides what the module's go.sum pins.
	sources []string
}

// The programs of other projects, each list built with the versions of libraries that its
// go.mod has.
var (
	kubernetes = goPrograms{
		name: "kubernetes", dir: "e2e/upstream",
		packages: []string{
			"k8s.io/kubernetes/cmd/kube-apiserver", "k8s.io/kubernetes/cmd/kube-controller-manager",
			"k8s.io/kubernetes/cmd/kube-scheduler", "k8s.io/kubernetes/cmd/kubectl", "k8s.io/kubernetes/cmd/kubelet",
			"k8s.io/kubernetes/test/images/agnhost",
		},
		version:   KubernetesVersion,
		versionIn: []string{"k8s.io/component-base/version.gitVersion", "k8s.io/client-go/pkg/version.gitVersion"},
	}
	provisioner = goPrograms{
		name: "csi-provisioner", dir: "e2e/sidecars/provisioner", versionIn: []string{"main.version"}, version: "e2e",
		packages: []string{"github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner"},
	}
	sidecars = goPrograms{
		name: "sidecars", dir: "e2e/sidecars", versionIn: []string{"main.version"}, version: "e2e",
		packages: []string{
			"github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher",
			"github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
			"github.com/kubernetes-csi/external-snapshotter/v8/cmd/csi-snapshotter",
			"github.com/kubernetes-csi/external-snapshotter/v8/cmd/snapshot-controller",
			"github.com/kubernetes-csi/lib-volume-populator/example/hello-populator",
		},
	}
)

// The programs of this repository.
var (
	ours = goPrograms{
		name: "stand-ins", dir: "e2e",
		packages: []string{"./images/csi-node-driver-registrar", "./images/livenessprobe", "./images/pause", "./writer"},
		sources:  []string{"e2e/images", "e2e/writer"},
	}
	chartInstaller = goPrograms{
		name: "release", dir: "tools/helm", packages: []string{"./release"},
		sources: []string{"tools/helm/release"},
	}
	driver = goPrograms{
		name: "csi-imgdisk", dir: ".", packages: []string{"./cmd/csi-imgdisk"},
		sources: []string{"cmd", "pkg", "internal"}, versionIn: []string{"main.version"},
	}
)

// build returns a directory with the programs.
func (g goPrograms) build(ctx context.Context, b *builder) (string, error) {
	return b.cache.get(ctx, g.name, g.key(b), func(ctx context.Context, dir string) error {
		args := append([]string{"build", "-trimpath", "-o", dir + "/"}, g.flags()...)
		return run(ctx, filepath.Join(b.root, g.dir), "go", append(args, g.packages...)...)
	})
}

// key is of all that the programs are made of.
func (g goPrograms) key(b *builder) *key {
	module := filepath.Join(b.root, g.dir)
	k := newKey().text(runtime.Version(), runtime.GOARCH).text(g.packages...).text(g.flags()...).
		files(filepath.Join(module, "go.mod"), filepath.Join(module, "go.sum"))
	for _, dir := range g.sources {
		k.sources(filepath.Join(b.root, dir))
	}
	return k
}

// flags are for the linker: without tables for debuggers, which are half of a program.
func (g goPrograms) flags() []string {
	flags := "-s -w"
	for _, name := range g.versionIn {
		flags += " -X " + name + "=" + g.version
	}
	return []string{"-ldflags=" + flags}
}

// debianPackage returns a directory with a package's files, without having installed it. Which
// version that is, is up to what apt knew when it was first asked.
func debianPackage(ctx context.Context, b *builder, name string) (string, error) {
	return b.cache.get(ctx, "debian-"+name, newKey().text(name, runtime.GOARCH), func(ctx context.Context, dir string) error {
		download := func() error { return run(ctx, dir, "apt-get", "-qq", "download", name) }
		if err := download(); err != nil {
			if err := run(ctx, dir, "apt-get", "-qq", "update"); err != nil {
				return err
			}
			if err := download(); err != nil {
				return err
			}
		}
		files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
		if err != nil || len(files) != 1 {
			return fmt.Errorf("apt-get download %s has made %d files: %w", name, len(files), err)
		}
		if err := run(ctx, dir, "dpkg-deb", "-x", files[0], dir); err != nil {
			return err
		}
		return os.Remove(files[0])
	})
}

// run runs a command, and has what it said in the error.
func run(ctx context.Context, dir, name string, args ...string) error {
	var said bytes.Buffer
	cmd := command(ctx, dir, name, args...)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, tail(said.String(), 40))
	}
	return nil
}

// output returns what a command writes to its standard output, without a newline at the
// end. Its complaints go to log.
func output(ctx context.Context, dir string, log io.Writer, name string, args ...string) (string, error) {
	cmd := command(ctx, dir, name, args...)
	cmd.Stderr = log
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// command is one that does not depend on how this process was called.
func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS="+strings.TrimSpace("-buildvcs=false "+os.Getenv("GOFLAGS")))
	return cmd
}

// tail returns the last lines of a text.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
