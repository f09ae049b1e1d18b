package suite

import (
	"fmt"
	"regexp"
	"slices"
)

// capabilities are what driver.yaml claims and what else the driver does, each with tests of
// which a driver without it would be skipped in all or fail. They are a short run; some tests
// show more than one capability.
var capabilities = []struct {
	name  string
	tests string // regular expression, found in at least one test's name
}{
	{"persistence", `Dynamic PV \(xfs\)\] \[Slow\] volumes should store data`},
	{"xfs", `Dynamic PV \(xfs\)\] \[Slow\] volumes should store data`},
	{"block", `Dynamic PV \(block volmode\)\] volumes should store data`},
	{"exec", `Dynamic PV \(default fs\)\] volumes should allow exec of files on the volume`},
	{"mount options", `Dynamic PV \(default fs\)\] provisioning should provision storage with mount options`},
	{"fsGroup", `Dynamic PV \(default fs\)\] fsgroupchangepolicy \(OnRootMismatch\)\[LinuxOnly\], pod created with an initial fsgroup, new pod fsgroup applied`},
	{"snapshotDataSource", `Dynamic Snapshot \(delete policy\)\] snapshottable .*after modifying source data, check deletion \(persistent\)`},
	{"snapshots of volumes in use", `Dynamic Snapshot \(delete policy\)\] snapshottable .*after modifying source data, check deletion \(persistent\)`},
	{"pvcDataSource", `Dynamic PV \(default fs\)\] provisioning should provision storage with pvc data source \(ROX mode\)`},
	{"capReadOnlyMany", `Dynamic PV \(default fs\)\] provisioning should provision storage with pvc data source \(ROX mode\)`},
	{"multipods", `Dynamic PV \(filesystem volmode\)\] multiVolume \[Slow\] should concurrently access the single volume from pods on the same node`},
	{"multiplePVsSameID", `Dynamic PV \(default fs\)\] provisioning should mount multiple PV pointing to the same storage on the same node`},
	{"offlineExpansion", `Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand Verify if offline PVC expansion works`},
	{"onlineExpansion", `Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand should resize volume when PVC is edited while pod is using it`},
	{"readWriteOncePod", `read-write-once-pod should block a second pod from using an in-use ReadWriteOncePod volume on the same node`},
	{"volumeLimits", `Dynamic PV \(filesystem volmode\)\] volumeLimits should verify that all csinodes have volume limits`},
	{"capacity", `capacity provides storage capacity information`},
	{"VolumeAttributesClass", `Dynamic PV \(default fs\)\] volume-modify .*should modify volume with no VAC`},
	{"ephemeral", `Generic Ephemeral-volume \(default fs\) \(late-binding\)\] ephemeral should create read/write inline ephemeral volume`},
}

// uncovered returns the capabilities of which no test passed, and those of which one was
// skipped, a line for each.
func uncovered(tests []Test) (complaints []string) {
	for _, c := range capabilities {
		pattern := regexp.MustCompile(c.tests)
		passed := false
		for _, t := range tests {
			if !pattern.MatchString(t.Name) {
				continue
			}
			passed = passed || t.State == Passed
			if t.State == Skipped {
				complaints = append(complaints, fmt.Sprintf("claimed capability %s: skipped: %s: %s", c.name, t.Name, t.Message))
			}
		}
		if !passed {
			complaints = append(complaints, fmt.Sprintf("claimed capability %s: no test of it passed", c.name))
		}
	}
	slices.Sort(complaints)
	return complaints
}
