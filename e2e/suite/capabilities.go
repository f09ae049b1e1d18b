package suite

import (
	"fmt"
	"regexp"
	"slices"
)

// capabilities are what driver.yaml claims, each with tests that a driver without it would
// be skipped in, or fail. All of the first test of each are a short run.
var capabilities = []struct {
	name  string
	tests string // regular expression, of at least one test's full name
}{
	{"persistence", `Dynamic PV \(default fs\)\] volumes should store data`},
	{"xfs", `Dynamic PV \(xfs\)\].* volumes should store data`},
	{"block", `Dynamic PV \(block volmode\)\] volumes should store data`},
	{"exec", `Dynamic PV \(default fs\)\] volumes should allow exec of files on the volume`},
	{"fsGroup", `Dynamic PV \(default fs\)\] fsgroupchangepolicy \(OnRootMismatch\)\[LinuxOnly\], pod created with an initial fsgroup, new pod fsgroup applied to volume contents`},
	{"mount options", `Dynamic PV \(default fs\)\] provisioning should provision storage with mount options`},
	{"snapshotDataSource", `Dynamic PV \(default fs\)\] provisioning should provision storage with snapshot data source`},
	{"snapshotDataSource of a volume in use", `Dynamic Snapshot \(delete policy\)\] snapshottable\[Feature:VolumeSnapshotDataSource\] volume snapshot controller\s+should check snapshot fields, check restore correctly works, check deletion \(persistent\)`},
	{"pvcDataSource", `Dynamic PV \(default fs\)\] provisioning should provision storage with pvc data source$`},
	{"multipods", `Dynamic PV \(filesystem volmode\)\] multiVolume \[Slow\] should concurrently access the single volume from pods on the same node$`},
	{"offlineExpansion", `Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand should resize volume when PVC is edited while pod is not using it|Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand Verify if offline PVC expansion works`},
	{"onlineExpansion", `Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand should resize volume when PVC is edited while pod is using it|Dynamic PV \(default fs\)\(allowExpansion\)\] volume-expand.*online`},
	{"readWriteOncePod", `read-write-once-pod.*should block a second pod from using an in-use ReadWriteOncePod volume on the same node`},
	{"capReadOnlyMany", `should.*read.?only.*many|ROX`},
	{"multiplePVsSameID", `multiple PVs with the same volumeHandle on the same node`},
	{"volumeLimits", `volumeLimits should support volume limits`},
	{"capacity", `capacity provides storage capacity information`},
	{"VolumeAttributesClass", `volume-modify.*should create a volume with VAC`},
	{"ephemeral", `Generic Ephemeral-volume \(default fs\)\] ephemeral should create read/write inline ephemeral volume`},
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
