package cluster

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// collectLimit is for each part of what is collected: a machine may not answer.
const collectLimit = 2 * time.Minute

// objects are the kinds whose state is collected.
const objects = "nodes,pods,deployments,daemonsets,persistentvolumeclaims,persistentvolumes,volumeattachments,csinodes," +
	"csistoragecapacities,storageclasses,volumesnapshots,volumesnapshotcontents,leases"

// machineCommands are what is collected of each machine, by the name of the file.
var machineCommands = map[string]string{
	"dmesg.txt":  "dmesg --ctime",
	"mounts.txt": "cat /proc/self/mountinfo",
	"ps.txt":     "ps -eo pid,ppid,stat,wchan:24,etime,args --forest; echo; free -m; echo; df -h",
	"blocks.txt": "lsblk -o NAME,MAJ:MIN,SIZE,RO,TYPE,MOUNTPOINTS; losetup --list",
	"net.txt":    "ip addr; ip route; iptables-save; ss -tn",
}

// Collect writes what tells why something failed to a directory, which it makes: the logs of
// all containers, those of the control plane, kubelets and containerds, kernels' messages,
// events, and the state of all objects of storage. What cannot be had is left out; the
// error says what.
func (c *Cluster) Collect(ctx context.Context, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var collecting sync.WaitGroup
	errs := make([]error, len(specs)+2)
	for i, s := range specs {
		collecting.Go(func() { errs[i] = c.machines[s.name].collect(ctx, filepath.Join(dir, s.name)) })
	}
	collecting.Go(func() { errs[len(specs)] = c.collectObjects(ctx, dir) })
	collecting.Go(func() {
		errs[len(specs)+1] = copyAll(filepath.Join(dir, "control-plane"), c.path("logs", "*.log"))
	})
	collecting.Wait()
	return errors.Join(errs...)
}

// collectObjects asks the API server.
func (c *Cluster) collectObjects(ctx context.Context, dir string) error {
	var errs []error
	for file, args := range map[string]string{
		"events.txt":   "get events --all-namespaces --sort-by=.lastTimestamp -o wide",
		"pods.txt":     "get pods --all-namespaces -o wide",
		"storage.txt":  "get persistentvolumeclaims,persistentvolumes,volumeattachments,volumesnapshots,volumesnapshotcontents --all-namespaces -o wide",
		"describe.txt": "describe pods,persistentvolumeclaims --all-namespaces",
		"objects.yaml": "get --all-namespaces -o yaml " + objects,
	} {
		errs = append(errs, func() error {
			ctx, cancel := context.WithTimeout(ctx, collectLimit)
			defer cancel()
			args := append([]string{"--kubeconfig=" + c.Kubeconfig(), "--request-timeout=30s"}, strings.Fields(args)...)
			out, err := exec.CommandContext(ctx, c.Kubectl(), args...).CombinedOutput()
			if err != nil {
				err = fmt.Errorf("collect %s: %w", file, err)
			}
			return errors.Join(err, os.WriteFile(filepath.Join(dir, file), out, 0o644))
		}())
	}
	return errors.Join(errs...)
}

// collect writes what a machine can tell.
func (m *Machine) collect(ctx context.Context, dir string) error {
	if err := copyAll(dir, m.path("*.log")); err != nil {
		return err
	}
	if !m.isOn() {
		return nil // its console is all there is
	}
	ctx, cancel := context.WithTimeout(ctx, collectLimit)
	defer cancel()
	for file, command := range machineCommands {
		out, err := m.Run(ctx, command)
		if err := errors.Join(err, os.WriteFile(filepath.Join(dir, file), []byte(out), 0o644)); err != nil {
			return err
		}
	}
	reader, writer := io.Pipe()
	go func() {
		// Files that grow meanwhile are no failure.
		err := m.Stream(ctx, "cd /var/log && tar -c --warning=no-file-changed --ignore-failed-read pods *.log 2>/dev/null || true", nil, writer, io.Discard)
		writer.CloseWithError(err)
	}()
	err := unpack(reader, dir)
	reader.CloseWithError(err) // who writes ends, too
	return err
}

// unpack writes the files of an archive below a directory.
func unpack(r io.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }() // it was only a way
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpack logs: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		if err := root.MkdirAll(filepath.Dir(h.Name), 0o755); err != nil {
			return err
		}
		file, err := root.Create(h.Name)
		if err != nil {
			return err
		}
		_, err = io.Copy(file, archive)
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
}

// copyAll copies the files that match a pattern to a directory, which it makes.
func copyAll(dir, pattern string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	paths, err := filepath.Glob(pattern)
	for _, path := range paths {
		err = errors.Join(err, copyFile(filepath.Join(dir, filepath.Base(path)), path))
	}
	return err
}

// telling matches lines of logs that are likely to say why something failed.
var telling = regexp.MustCompile(`level=ERROR|"level":"error"|^E[0-9]{4} |panic: |fatal error: |BUG: |Oops|Out of memory|I/O error|EXT4-fs error|XFS.*(Corruption|corruption)|blocked for more than|\bWarning\b.*Failed`)

// Limits of what Telling returns.
const (
	tellingPerFile   = 6
	tellingLineBytes = 400
)

// Telling returns the last lines of each collected file that are likely to say why something
// failed: of the driver's pods, the kernels, and the events.
func Telling(dir string) []string {
	var lines []string
	for _, pattern := range []string{"*/pods/*imgdisk*/*/*.log", "*/dmesg.txt", "*/console.log", "events.txt"} {
		files, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range files {
			name, _ := filepath.Rel(dir, path)
			for _, line := range tellingLines(path) {
				lines = append(lines, name+": "+line)
			}
		}
	}
	return lines
}

func tellingLines(path string) []string {
	file, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer file.Close()
	var last []string
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		// The container runtime puts a time and the stream before each line.
		if _, message, ok := strings.Cut(line, " F "); ok && strings.HasPrefix(line, "20") {
			line = message
		}
		if telling.MatchString(line) {
			last = append(last[max(0, len(last)-tellingPerFile+1):], line[:min(len(line), tellingLineBytes)])
		}
	}
	return last
}
