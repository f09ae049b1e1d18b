package main

import (
	"cmp"
	"os"
	"time"
)

// machine is one to boot.
type machine struct {
	name      string
	memoryMiB int
	programs  []string // that are built and packed; the first is run
	run       string   // which of its tests, as go test -run has it; "" is all
	arguments []string // its arguments, without commas and spaces
	once      bool     // what it tests hardly depends on the kernel: only the first runs it
}

// testMachines run the tests, each those that say that they run on it.
var testMachines = []machine{
	{name: "transports", memoryMiB: 1536, programs: []string{"guest.test"}},
	{name: "volumes", memoryMiB: 1024, programs: []string{"volumes.test", "csi-imgdisk"}},
	{name: "stall", memoryMiB: 1024, programs: []string{"volumes.test", "csi-imgdisk"}, once: true},
	// Less memory than what its tests write into page caches.
	{name: "memory", memoryMiB: 320, programs: []string{"volumes.test", "csi-imgdisk"}, once: true},
	// Its own tests of what differs where root has all capabilities, and between transports.
	{name: "supervisor", memoryMiB: 1024, programs: []string{"supervisor.test"},
		run: "^TestDevice_(FitForMemoryPressure|DetachIsDurable|DetachByForceLeavesNoZombie|AllAndKeeperKilled)$"},
}

// builds are how go makes the programs.
var builds = map[string][]string{
	"guest.test":      {"test", "-c", "./test/vm/guest"},
	"volumes.test":    {"test", "-c", "./test/vm/volumes"},
	"supervisor.test": {"test", "-c", "./pkg/nbdlocal/supervisor"},
	"soak":            {"build", "./test/soak"},
	"csi-imgdisk":     {"build", "./cmd/csi-imgdisk"},
}

// chosen returns the machines to boot.
func (c config) chosen() []machine {
	if c.soak > 0 {
		return []machine{{
			name: "soak", memoryMiB: 1536, programs: []string{"soak", "csi-imgdisk"},
			arguments: []string{"-for=" + c.soak.String(), "-binary=/bin/csi-imgdisk", "-dir=/store", "-volumes=4"},
		}}
	}
	var list []machine
	for _, m := range testMachines {
		if !c.machines.MatchString(m.name) {
			continue
		}
		m.arguments = []string{"-test.v", "-test.timeout=" + (c.limit - 30*time.Second).String()}
		if run := cmp.Or(c.run, m.run); run != "" {
			m.arguments = append(m.arguments, "-test.run="+run)
		}
		list = append(list, m)
	}
	return list
}

// passedOn are the variables of the environment that machines are told, too: a seed that is
// to be replayed, and how often to attach and detach.
var passedOn = []string{"IMGDISK_SEED", "IMGDISK_CYCLES"}

// commandLine is what the machine runs.
func (m machine) commandLine() []string {
	var env []string
	for _, name := range passedOn {
		if value := os.Getenv(name); value != "" {
			env = append(env, name+"="+value)
		}
	}
	line := append([]string{m.programs[0]}, m.arguments...)
	if env == nil {
		return line
	}
	return append(append([]string{"env"}, env...), line...)
}
