// Package drivertest runs csi-sanity in a test's own process.
package drivertest

import (
	"fmt"
	"path/filepath"
	"slices"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// unclaimed are the reasons for which csi-sanity may skip a specification: capabilities
// that the driver does not claim, and a limit that Kubernetes' scheduler keeps.
var unclaimed = []string{
	"ControllerModifyVolume not supported",
	"Modify volume not supported",
	"Modify Volume not supported",
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported",
	"GroupControllerService not supported",
	"NodeGetStorageHealth not supported",
	"testnodevolumeattachlimit not enabled",
}

// Sanity runs csi-sanity against the driver at an endpoint, with block volumes and with
// mounted ones of a GiB, expanded to two. The test fails for each specification that
// fails, or is skipped though the driver claims the capability. It can run once in a
// process.
func Sanity(t *testing.T, endpoint string) {
	dir := t.TempDir()
	for _, access := range []string{"block", "mount"} {
		config := sanity.NewTestConfig()
		config.Address = endpoint
		config.TargetPath = filepath.Join(dir, access+"-target")
		config.StagingPath = filepath.Join(dir, access+"-staging")
		config.TestVolumeAccessType = access
		config.TestVolumeSize = 1 << 30
		config.TestVolumeExpandSize = 2 << 30
		ginkgo.Describe(access, func() { sanity.GinkgoTest(&config) })
	}
	ginkgo.ReportAfterSuite("counts", func(report ginkgo.Report) { judge(t, report) })
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct = true
	reporter.NoColor = true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
}

// judge logs how many specifications passed, and names those that did not.
func judge(t *testing.T, report ginkgo.Report) {
	counts := map[types.SpecState]int{}
	skips := map[string]int{}
	for _, spec := range report.SpecReports {
		if spec.LeafNodeType != types.NodeTypeIt {
			continue
		}
		counts[spec.State]++
		switch spec.State {
		case types.SpecStatePassed, types.SpecStatePending: // pending: by csi-sanity's own choice
		case types.SpecStateSkipped:
			skips[spec.Failure.Message]++
			if !slices.Contains(unclaimed, spec.Failure.Message) {
				t.Errorf("skipped: %s: %s", spec.FullText(), spec.Failure.Message)
			}
		default:
			t.Errorf("%s: %s: %s", spec.State, spec.FullText(), spec.Failure.Message)
		}
	}
	t.Logf("csi-sanity: %s", describe(counts))
	for reason, n := range skips {
		t.Logf("skipped %d: %s", n, reason)
	}
}

func describe(counts map[types.SpecState]int) string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped, %d pending", counts[types.SpecStatePassed],
		counts[types.SpecStateFailed]+counts[types.SpecStatePanicked]+counts[types.SpecStateTimedout],
		counts[types.SpecStateSkipped], counts[types.SpecStatePending])
}
