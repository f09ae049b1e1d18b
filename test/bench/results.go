package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// results are a run's figures: what results.json holds.
type results struct {
	Date        string            `json:"date"`
	Machine     machine           `json:"machine"`
	Versions    map[string]string `json:"versions"`
	Seconds     float64           `json:"secondsPerMeasurement"`
	Rounds      int               `json:"rounds"`
	SizeMiB     int64             `json:"imageMiB"`
	Figures     []*figures        `json:"figures"`
	Comparisons []comparison      `json:"comparisons"`
	Skipped     []skipped         `json:"skipped"`
}

// machine says where figures are from: only ratios mean anything elsewhere.
type machine struct {
	CPUs       int     `json:"cpus"`
	Model      string  `json:"model"`
	Kernel     string  `json:"kernel"`
	FileSystem string  `json:"fileSystem"`
	Memory     string  `json:"memoryFileSystem"` // of images that are read and overwritten
	Load       float64 `json:"loadBefore"`       // 1-minute average: others' work spoils figures
}

// figures are what one contender reached at one work in one format, round by round.
type figures struct {
	Work   string    `json:"work"`
	Format string    `json:"format"`
	Server string    `json:"contender"`
	Unit   string    `json:"unit"`
	Values []float64 `json:"values"`
	Costs  []costs   `json:"costs,omitempty"` // in rounds in which they were measured
}

// skipped is what was not measured.
type skipped struct {
	What   string `json:"what"`
	Reason string `json:"reason"`
	Failed bool   `json:"failed,omitempty"` // it should have been
}

// fileSystems names where the images are.
func (m *machine) fileSystems() string {
	if m.Memory == "" || m.Memory == m.FileSystem {
		return m.FileSystem
	}
	return m.FileSystem + " (read and overwrite: " + m.Memory + ")"
}

func (r *results) describe(b *bench) {
	r.Date = time.Now().UTC().Format(time.RFC3339)
	r.Seconds, r.Rounds, r.SizeMiB = b.seconds, b.rounds, b.sizeMiB
	r.Machine = describeMachine(b.dir)
	r.Machine.Memory = fileSystem(b.memory)
	r.Versions = map[string]string{}
	for name, command := range map[string][]string{
		ours: {b.binary, "version"}, qemuNBD: {"qemu-nbd", "--version"}, nbdkit: {"nbdkit", "--version"}, "fio": {"fio", "--version"},
		qemuStorageDaemon: {qemuStorageDaemon, "--version"},
	} {
		if out, err := exec.Command(command[0], command[1:]...).Output(); err == nil {
			r.Versions[name], _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
		}
	}
}

func describeMachine(dir string) machine {
	m := machine{CPUs: runtime.NumCPU(), FileSystem: fileSystem(dir)}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.Model = cpuModel(string(text))
	}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		_, _ = fmt.Sscan(string(text), &m.Load) // 0 if it cannot be known
	}
	return m
}

func cpuModel(cpuinfo string) string {
	for line := range strings.Lines(cpuinfo) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// fileSystem names the kind of file system that a directory is on.
func fileSystem(dir string) string {
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs",
		unix.TMPFS_MAGIC: "tmpfs", unix.NFS_SUPER_MAGIC: "nfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return "unknown"
	}
	if name, ok := names[st.Type]; ok {
		return name
	}
	return fmt.Sprintf("%#x", st.Type)
}

// find returns the figures of a contender, nil if there are none.
func (r *results) find(work, format, server string) *figures {
	i := slices.IndexFunc(r.Figures, func(f *figures) bool { return f.Work == work && f.Format == format && f.Server == server })
	if i < 0 {
		return nil
	}
	return r.Figures[i]
}

func (r *results) add(f figure, format, server string) {
	to := r.find(f.work, format, server)
	if to == nil {
		to = &figures{Work: f.work, Format: format, Server: server, Unit: f.unit}
		r.Figures = append(r.Figures, to)
	}
	to.Values = append(to.Values, f.value)
	if c := f.usage.perOperation(); c != nil {
		to.Costs = append(to.Costs, *c)
	}
}

// failures counts what should have been measured and was not.
func (r *results) failures() int {
	n := 0
	for _, s := range r.Skipped {
		if s.Failed {
			n++
		}
	}
	return n
}

// median of at least one value.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// write writes results.json and results.svg.
func (r *results) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	picture, err := r.plot()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.svg"), picture, 0o644)
}
