package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Addresses in a cluster's own network.
const (
	apiAddress  = "10.77.0.1" // of the bridge: the control plane listens there
	networkBits = "/24"
	networkCIDR = "10.77.0.0/24"

	serviceCIDR    = "10.79.0.0/24"
	serviceAddress = "10.79.0.1" // of service kubernetes

	apiPort = "6443"
)

// network is a cluster's network namespace, and how this machine reaches it.
type network struct {
	Namespace   string // also the name of the interface on this machine
	HostAddress string // of that interface
	APIAddress  string // of its other end, in the namespace
}

// hostPool are the addresses from which each cluster takes four. They are set aside for
// tests of networks, so nobody has routes there.
var hostPool = netip.MustParsePrefix("198.18.0.0/15")

// addressesPerCluster are those of a veth pair's network.
const addressesPerCluster = 4

// makeNetwork makes a namespace with a bridge, and with a tap device for each machine. After an
// error the caller removes what it returns.
func makeNetwork(ctx context.Context, machines []spec) (network, error) {
	var random [3]byte
	if _, err := rand.Read(random[:]); err != nil {
		return network{}, err
	}
	host, api, err := freeAddresses()
	if err != nil {
		return network{}, err
	}
	n := network{"imgdisk-" + hex.EncodeToString(random[:]), host, api}
	inside := "ip -n " + n.Namespace + " "
	commands := []string{
		"ip netns add " + n.Namespace,
		inside + "link set lo up",
		"ip link add " + n.Namespace + " type veth peer name host netns " + n.Namespace,
		"ip addr add " + host + "/30 dev " + n.Namespace,
		"ip link set " + n.Namespace + " up",
		inside + "addr add " + api + "/30 dev host",
		inside + "link set host up",
		inside + "link add machines type bridge",
		inside + "addr add " + apiAddress + networkBits + " dev machines",
		inside + "link set machines up",
	}
	for _, s := range machines {
		commands = append(commands,
			inside+"tuntap add dev "+s.name+" mode tap",
			inside+"link set "+s.name+" master machines up")
		if s.podCIDR != "" {
			commands = append(commands, inside+"route add "+s.podCIDR+" via "+s.address)
		}
	}
	for _, c := range commands {
		fields := strings.Fields(c)
		if err := command(ctx, fields[0], fields[1:]...); err != nil {
			return n, err
		}
	}
	return n, nil
}

// freeAddresses returns two of a network that no interface of this machine's is in.
func freeAddresses() (first, second string, err error) {
	used, err := net.InterfaceAddrs()
	if err != nil {
		return "", "", fmt.Errorf("list this machine's addresses: %w", err)
	}
	count := 1 << (hostPool.Addr().BitLen() - hostPool.Bits()) / addressesPerCluster
	var random [2]byte
	for range count {
		if _, err := rand.Read(random[:]); err != nil {
			return "", "", err
		}
		offset := (int(random[0])<<8 | int(random[1])) % count * addressesPerCluster
		base := hostPool.Addr().As4()
		base[1] += byte(offset >> 16)
		base[2], base[3] = byte(offset>>8), byte(offset)
		start := netip.AddrFrom4(base)
		pair := netip.PrefixFrom(start, 30)
		if !overlaps(pair, used) {
			return start.Next().String(), start.Next().Next().String(), nil
		}
	}
	return "", "", fmt.Errorf("no free network in %v", hostPool)
}

func overlaps(p netip.Prefix, used []net.Addr) bool {
	for _, a := range used {
		if other, err := netip.ParsePrefix(a.String()); err == nil && p.Overlaps(other) {
			return true
		}
	}
	return false
}

// killLimit is how long processes have to go after they were killed.
const killLimit = time.Minute

// remove kills all processes in the namespace and removes it with all its devices. What
// is not there is no error.
func (n network) remove(ctx context.Context) error {
	if n.Namespace == "" {
		return nil
	}
	for deadline := time.Now().Add(killLimit); ; {
		pids := n.processes(ctx)
		if len(pids) == 0 {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v in network namespace %s don't end after SIGKILL", pids, n.Namespace)
		}
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
	// Removing one end of the pair removes both at once; with the namespace it would take a while.
	_ = command(ctx, "ip", "link", "del", n.Namespace)
	if err := command(ctx, "ip", "netns", "del", n.Namespace); err != nil && n.exists(ctx) {
		return err
	}
	return nil
}

// processes are those in the namespace: they are the cluster's, all of them.
func (n network) processes(ctx context.Context) []int {
	out, err := exec.CommandContext(ctx, "ip", "netns", "pids", n.Namespace).Output()
	if err != nil {
		return nil // no such namespace
	}
	var pids []int
	for field := range strings.FieldsSeq(string(out)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (n network) exists(ctx context.Context) bool {
	return command(ctx, "ip", "netns", "exec", n.Namespace, "true") == nil
}

// inside returns a program's command line that runs it in the namespace, as one process.
func (n network) inside(program string, args ...string) []string {
	return append([]string{"nsenter", "--net=/run/netns/" + n.Namespace, "--", program}, args...)
}
