package tests

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
	"github.com/csi-imgdisk/csi-imgdisk/e2e/suite"
)

// TestUpstream runs Kubernetes' own storage suite: a test for each capability, or with
// IMGDISK_E2E_FULL all that there are. It comes last, because it is not ours.
func TestUpstream(t *testing.T) {
	if world.cluster == nil {
		t.Skip("needs a cluster: IMGDISK_E2E names none, see e2e/main.go")
	}
	dir := os.Getenv("IMGDISK_E2E")
	programs, err := parts.BuildStorageSuite(t.Context(), filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	results := filepath.Join(filepath.Dir(dir), "upstream")
	tests, err := suite.Run(t.Context(), suite.Config{
		Programs: programs, Kubectl: world.cluster.Kubectl(), Kubeconfig: world.cluster.Kubeconfig(),
		Dir: results, Full: os.Getenv("IMGDISK_E2E_FULL") != "", Processes: 5, Log: t.Output(),
	})
	if len(tests) > 0 {
		fmt.Printf("Kubernetes' storage suite (%s):\n%s\n", results, suite.Table(tests))
	}
	if err != nil {
		t.Error(err)
	}
}
