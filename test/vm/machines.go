package main

import (
	"os"
	"time"
)

// machine is one to boot.
type machine struct {
	name      string
	memoryMiB int
	arguments []string // the program to run and its arguments, without commas and spaces
}

// testMachines run the tests, each those that say that they run on it.
var testMachines = []machine{
	{"transports", 1536, []string{"guest.test"}},
	{"volumes", 1024, []string{"volumes.test"}},
	{"stall", 1024, []string{"volumes.test"}},
	{"memory", 320, []string{"volumes.test"}}, // MiB: less than what its tests write into page caches
}

// chosen returns the machines to boot.
func (c config) chosen() []machine {
	if c.soak > 0 {
		return []machine{{"soak", 1536, withSeed("soak", "-for="+c.soak.String(), "-binary=/bin/csi-imgdisk", "-dir=/store")}}
	}
	var list []machine
	for _, m := range testMachines {
		if !c.machines.MatchString(m.name) {
			continue
		}
		m.arguments = append(withSeed(m.arguments...), "-test.v", "-test.timeout="+(c.limit-30*time.Second).String())
		if c.run != "" {
			m.arguments = append(m.arguments, "-test.run="+c.run)
		}
		list = append(list, m)
	}
	return list
}

// withSeed lets a seed that is to be replayed reach the machine.
func withSeed(arguments ...string) []string {
	if seed := os.Getenv("IMGDISK_SEED"); seed != "" {
		return append([]string{"env", "IMGDISK_SEED=" + seed}, arguments...)
	}
	return arguments
}
