package tests

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster"
)

// formats are the names of all that volumes can be made of; VHD is called as QEMU does.
var formats = []string{"vmdk", "vhdx", "vdi", "qcow", "qcow2", "vpc", "raw"}

// many are so many volumes: one of each format and kind, and block volumes.
const many = 60

// Many volumes at once: made, attached to both nodes and written to, snapshotted, moved to the
// other node if they are of a certain format, deleted.
func TestMany(t *testing.T) {
	e := newEnv(t)
	times := newTable("many", fmt.Sprint(many, " volumes at once"), "took")
	since := time.Now()
	step := func(what string) {
		times.add(what, time.Since(since))
		since = time.Now()
	}
	names, moved := e.claimMany()
	dirs := e.bound(names...)
	step("created: all claims bound")

	for i, node := range bothNodes {
		e.pod(user("first-"+node, node, names[i*many/2:(i+1)*many/2], fill))
	}
	for _, node := range bothNodes {
		e.running("first-" + node)
	}
	fileSystems := 2 * len(formats)
	step(fmt.Sprintf("attached: %d block devices and %d new file systems in two pods that run", many-fileSystems, fileSystems))
	var sums []string
	for _, node := range bothNodes {
		sums = append(sums, e.sums("first-"+node, many/2)...)
	}
	step("written to and flushed")

	var snaps []string
	for _, name := range names {
		snaps = append(snaps, e.snapshot("s-"+name, name, ""))
	}
	e.ready(snaps...)
	step("snapshotted while attached: all ready")

	for _, node := range bothNodes {
		e.end("first-" + node)
	}
	e.detached(names...)
	step("unmounted and detached: both pods gone")

	for i, node := range bothNodes {
		e.pod(user("second-"+node, node, moved[1-i], sum))
	}
	var read []string
	for i, node := range bothNodes {
		read = append(read, e.sums("second-"+node, len(moved[1-i]))...)
	}
	for _, line := range read {
		if !slices.Contains(sums, line) {
			e.Errorf("what was read on the other node, %q, is not among what was written:\n%s", line, strings.Join(sums, "\n"))
		}
	}
	for _, node := range bothNodes {
		e.end("second-" + node)
	}
	e.check(dirs...)
	step(fmt.Sprintf("%d volumes, of each format with ext4, XFS and as a block device, read on the other node; all checked", len(read)))

	for i := range names {
		e.deleteClaim(names[i])
		e.deleteSnapshot(snaps[i])
	}
	e.gone(append(names, snaps...)...)
	step("volumes and snapshots deleted")
	e.nothingLeft(t.Context())
	step("nothing left in the store")
	times.print(e)
	if strings.Contains(e.on(cluster.NodeA, "lsblk -dno NAME,SIZE 2>/dev/null || true"), " 32M") {
		t.Error("a device of 32 MiB is left on", cluster.NodeA)
	}
}

// claimMany makes the claims; the first half of them is for node-a. moved are those of each
// format and kind, for each half.
func (e *env) claimMany() (names []string, moved [2][]string) {
	var halves [2][]string
	for i, format := range formats {
		class := e.class(map[string]string{"store": "main", "format": format})
		xfs := e.class(map[string]string{"store": "main", "format": format, "csi.storage.k8s.io/fstype": "xfs"})
		halves[i%2] = append(halves[i%2],
			e.claim(claim{name: "ext4-" + format, size: "128Mi", class: class}),
			e.claim(claim{name: "xfs-" + format, size: "320Mi", class: xfs}),
			e.claim(claim{name: "block-" + format, size: "128Mi", block: true, class: class}))
	}
	moved = halves
	for i := range halves {
		for len(halves[i]) < many/2 {
			halves[i] = append(halves[i], e.claim(claim{name: fmt.Sprintf("block-%d-%d", i, len(halves[i])), size: "32Mi", block: true}))
		}
		names = append(names, halves[i]...)
	}
	return names, moved
}

// user is a pod that runs a script for each claim, which is of the kind that its name begins
// with, says so, and waits until it is told to end.
func user(name, node string, claims []string, scripts map[string]string) pod {
	p := pod{name: name, node: node}
	for _, claim := range claims {
		kind, _, _ := strings.Cut(claim, "-")
		if kind == "block" {
			p.blocks = append(p.blocks, claim)
		} else {
			p.files = append(p.files, claim)
		}
		p.script += fmt.Sprintf(scripts[kind], claim)
	}
	p.script += "echo done\n" + untilTold
	return p
}

// sums returns the lines with checksums that a user has said, of so many claims.
func (e *env) sums(pod string, claims int) (lines []string) {
	e.Helper()
	said := e.says(pod, "done")
	for line := range strings.Lines(said) {
		if _, text, ok := strings.Cut(line, " sum "); ok {
			lines = append(lines, strings.TrimSpace(text))
		}
	}
	if len(lines) != claims {
		e.Fatalf("pod %s used %d claims, and said %d checksums: %s", pod, claims, len(lines), said)
	}
	return lines
}

// Scripts for a claim of each kind, which is %[1]s. sum says the checksum of what fill wrote.
var (
	fill = map[string]string{
		"ext4":  `test "$(stat -f -c %%T /%[1]s)" = ext2/ext3; ` + fillFile,
		"xfs":   `test "$(stat -f -c %%T /%[1]s)" = xfs; ` + fillFile,
		"block": "head -c 1048576 /dev/urandom | dd of=/dev/%[1]s bs=1M seek=20 iflag=fullblock oflag=direct conv=fsync status=none\n" + sum["block"],
	}
	fillFile = "head -c 1048576 /dev/urandom >/%[1]s/data; sync /%[1]s/data\n" + sumFile
	sum      = map[string]string{
		"ext4":  sumFile,
		"xfs":   sumFile,
		"block": `echo "sum %[1]s $(dd if=/dev/%[1]s bs=1M skip=20 count=1 iflag=direct status=none | sha256sum)"` + "\n",
	}
	sumFile = `echo "sum %[1]s $(sha256sum </%[1]s/data)"` + "\n"
)
