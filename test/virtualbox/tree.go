package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strings"
)

// tree is the root directory of an unpacked VirtualBox.
type tree string

const (
	// workDir is where programs in a tree find the directory they work on.
	workDir = "/work"
	// manager creates, registers and reads media, through a service that it starts.
	manager = "/usr/lib/virtualbox/VBoxManage"
)

// inside runs a program in a tree: $1 is the tree, $2 the directory to work on.
const inside = `
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs tmpfs "$1/tmp"
mount --bind "$2" "$1/work"
root=$1
shift 2
exec chroot "$root" "$@"
`

// manage runs VirtualBox's manager on a directory, which it knows as workDir, and returns
// what it prints. Mounts and processes that it leaves end with it, because it has its own
// namespaces. What it remembers, such as which image is whose parent, is in the
// directory's subdirectory "home".
func (t tree) manage(ctx context.Context, dir string, args ...string) (string, error) {
	unshare := []string{"--mount", "--pid", "--ipc", "--uts", "--net", "--fork", "--kill-child"}
	if os.Geteuid() != 0 {
		unshare = append(unshare, "--user", "--map-root-user")
	}
	unshare = append(unshare, "/bin/sh", "-e", "-c", inside, "sh", string(t), dir, manager, "--nologo")
	cmd := exec.CommandContext(ctx, "unshare", append(unshare, args...)...)
	home := path.Join(workDir, "home")
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "VBOX_USER_HOME=" + home, "LC_ALL=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("VBoxManage %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}
