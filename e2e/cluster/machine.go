package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/wire"
)

// spec is what is fixed about a machine.
type spec struct {
	name      string
	address   string
	podCIDR   string // empty: not a node
	memoryMiB int
}

// specs are the machines of each cluster.
var specs = []spec{
	{NFS, NFSAddress, "", 768},
	{NodeA, "10.77.0.11", "10.78.1.0/24", 2560},
	{NodeB, "10.77.0.12", "10.78.2.0/24", 2560},
}

func (s spec) isNode() bool { return s.podCIDR != "" }

// Machine is one of a cluster's. Its methods may be called at the same time, and from several
// processes, but for PowerOff and PowerOn of one machine.
type Machine struct {
	spec
	c *Cluster
}

// Name is the machine's name, and its node's if it is one.
func (m *Machine) Name() string { return m.name }

// Address is that in the cluster's network.
func (m *Machine) Address() string { return m.address }

// path returns one below the machine's own directory.
func (m *Machine) path(names ...string) string {
	return m.c.path(append([]string{m.name}, names...)...)
}

// Files in a machine's directory.
const (
	pidFile     = "pid"
	consoleFile = "console.log"
)

// qemu returns the emulator's command line. Its paths are relative to the machine's directory:
// those of sockets may not be long.
func (m *Machine) qemu() []string {
	args := []string{
		"-name", "imgdisk-" + m.name, "-nodefaults", "-display", "none", "-no-reboot", "-pidfile", pidFile,
		// Without what costs an emulator the most: page tables of five levels, instructions that
		// copy and clear memory byte by byte, bits that tell user's from kernel's pages.
		"-accel", "tcg,thread=multi", "-cpu", "max,la57=off,erms=off,smap=off,smep=off",
		// One processor: with more, emulated ones wait for each other, and now and then trip over
		// a kernel that changes its own code while it starts.
		"-smp", "1", "-m", strconv.Itoa(m.memoryMiB),
		"-kernel", m.c.state.Base.Kernel, "-initrd", m.c.state.Base.Initramfs,
		// On a loaded machine ACPI's methods for interrupts run into their limits of time; without
		// all of ACPI there would be no clock that keeps the time.
		"-append", "console=ttyS0 panic=-1 quiet net.ifnames=0 acpi=noirq " +
			"mitigations=off nowatchdog no_timer_check tsc=reliable init_on_alloc=0 apparmor=0 audit=0",
		"-serial", "file:" + consoleFile,
		"-device", "virtio-rng-pci",
		"-netdev", "tap,id=net,ifname=" + m.name + ",script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=net,romfile=,mac=" + m.mac(),
		"-device", "virtio-serial-pci",
	}
	for _, d := range m.disks() {
		// The host's kernel keeps what it was given when the emulator is killed, so a
		// power cut needs no flush to this machine's disk.
		args = append(args, "-drive", "if=virtio,cache=unsafe,discard=unmap,format="+d.format+",file="+d.file)
	}
	for i := range wire.Ports {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=agent%d,path=%s,server=on,wait=off", i, socketName(i)),
			"-device", fmt.Sprintf("virtserialport,chardev=agent%d,name=%s%d", i, wire.PortPrefix, i))
	}
	return m.c.state.Network.inside("qemu-system-x86_64", args...)
}

// mac is an address of the range for local use that ends as the machine's does.
func (m *Machine) mac() string {
	last, _ := strconv.Atoi(m.address[strings.LastIndexByte(m.address, '.')+1:])
	return fmt.Sprintf("52:54:00:77:00:%02x", last)
}

// isOn tells whether the machine's emulator runs.
func (m *Machine) isOn() bool { return m.pid() != 0 }

// pid is that of the emulator, 0 if it does not run.
func (m *Machine) pid() int {
	text, err := os.ReadFile(m.path(pidFile))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	// Not another's that has the number now, and not one that has ended but was not waited for:
	// that has no command line.
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !slices.Contains(strings.Split(string(line), "\x00"), "imgdisk-"+m.name) {
		return 0
	}
	return pid
}

// PowerOff ends the machine as a power cut does. Its disks keep what it has flushed. It returns
// when the machine is off, and may be called of one that is.
func (m *Machine) PowerOff() error {
	pid := m.pid()
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%s: power off: %w", m.name, err)
	}
	for deadline := time.Now().Add(killLimit); m.pid() == pid; time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: power off: process %d does not end", m.name, pid)
		}
	}
	return nil
}

// Booting is tried again, for what a loaded machine does to a kernel that starts. It takes
// half a minute, and 20 times as long on a machine with 30 other things to do.
const (
	bootTries = 2
	bootLimit = 12 * time.Minute
)

// PowerOn starts the machine and returns when its first process has started all services: the NFS
// server serves then, a kubelet takes longer until its node is ready.
// What Cut did to it before it was powered off is undone.
func (m *Machine) PowerOn(ctx context.Context) error {
	if m.isOn() {
		return nil
	}
	var err error
	for range bootTries {
		if err = m.boot(ctx); err == nil || ctx.Err() != nil {
			return err
		}
		if offErr := m.PowerOff(); offErr != nil {
			return errors.Join(err, offErr)
		}
	}
	return err
}

func (m *Machine) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	_ = os.Remove(m.path(pidFile)) // of the last time
	emulator := m.path("qemu.log")
	p, err := startProcess(m.path(), emulator, m.qemu())
	if err != nil {
		return fmt.Errorf("%s: power on: %w", m.name, err)
	}
	for !m.isOn() {
		select {
		case <-p.ended:
			return fmt.Errorf("%s: the emulator has ended:\n%s", m.name, lastLines(emulator, 10))
		case <-time.After(pollInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if _, err := m.Run(ctx, "until [ -e /run/started ]; do sleep 0.5; done"); err != nil {
		return fmt.Errorf("%s does not start: %w\n%s", m.name, err, lastLines(m.path(consoleFile), 20))
	}
	return nil
}

// peers are what a machine can be cut off from.
var peers = map[string]string{"api": apiAddress, NFS: NFSAddress}

// Cut cuts the machine, with all of its pods, off from "api" (the control plane), "nfs" or both:
// packets in both directions are dropped from now on. Run works nevertheless.
func (m *Machine) Cut(ctx context.Context, from ...string) error {
	var script strings.Builder
	script.WriteString("set -e\n")
	for _, peer := range from {
		address := peers[peer]
		if address == "" {
			return fmt.Errorf("%s: cut off from %q: it can be \"api\" or %q", m.name, peer, NFS)
		}
		fmt.Fprintf(&script, "iptables -w -A imgdisk-cut -s %[1]s -j DROP\niptables -w -A imgdisk-cut -d %[1]s -j DROP\n", address)
	}
	_, err := m.Run(ctx, script.String())
	return err
}

// Heal undoes every Cut of the machine.
func (m *Machine) Heal(ctx context.Context) error {
	_, err := m.Run(ctx, "iptables -w -F imgdisk-cut")
	return err
}

// settings are what a machine's first process has to know, as assignments of a shell.
func (m *Machine) settings() string {
	var routes []string
	for _, s := range specs {
		if s.isNode() && s.name != m.name {
			routes = append(routes, s.podCIDR+"="+s.address)
		}
	}
	return strings.Join([]string{
		"NAME=" + m.name,
		"ADDRESS=" + m.address + networkBits,
		"GATEWAY=" + apiAddress,
		"POD_CIDR=" + m.podCIDR,
		"ROUTES='" + strings.Join(routes, " ") + "'",
		"API=" + apiAddress + ":" + apiPort,
		"SERVICE=" + serviceAddress,
		"NETWORK=" + networkCIDR,
		"EXPORT=" + ExportPath,
		"PAUSE_IMAGE=" + m.c.state.PauseImage,
		"",
	}, "\n")
}

// makeFiles makes the machine's directory with its disks.
func (m *Machine) makeFiles(ctx context.Context) error {
	if err := os.MkdirAll(m.path(), 0o755); err != nil {
		return err
	}
	for _, d := range m.disks() {
		if err := d.make(ctx, m, m.path(d.file)); err != nil {
			return fmt.Errorf("%s: make disk %s: %w", m.name, d.file, err)
		}
	}
	return nil
}
