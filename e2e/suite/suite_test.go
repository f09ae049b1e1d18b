package suite

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

func TestReadResults(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results.json")
	const report = `[{"SpecReports": [
		{"LeafNodeType": "BeforeSuite", "State": "passed"},
		{"ContainerHierarchyTexts": ["External Storage", "volumes"], "LeafNodeText": "should store data", "LeafNodeType": "It", "State": "passed", "RunTime": 2000000000},
		{"ContainerHierarchyTexts": ["External Storage"], "LeafNodeText": "not selected", "LeafNodeType": "It", "State": "skipped"},
		{"ContainerHierarchyTexts": ["External Storage"], "LeafNodeText": "not for it", "LeafNodeType": "It", "State": "skipped", "Failure": {"Message": "does not support it"}},
		{"ContainerHierarchyTexts": ["External Storage"], "LeafNodeText": "broken", "LeafNodeType": "It", "State": "timedout", "Failure": {"Message": "took too long"}},
		{"LeafNodeType": "AfterSuite", "State": "failed", "Failure": {"Message": "left something"}}
	]}]`
	if err := os.WriteFile(path, []byte(report), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := readResults(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []Test{
		{"External Storage volumes should store data", Passed, "", 2 * time.Second},
		{"External Storage not for it", Skipped, "does not support it", 0},
		{"External Storage broken", Failed, "took too long", 0},
		{"", Failed, "left something", 0},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestReadResults_NothingRan(t *testing.T) {
	path := filepath.Join(t.TempDir(), "results.json")
	if err := os.WriteFile(path, []byte(`[{"SpecReports": []}]`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readResults(path); err == nil {
		t.Error("a report without tests is accepted")
	}
}

func TestTable(t *testing.T) {
	page := Table([]Test{
		{"External Storage [Driver: x] [Testpattern: Dynamic PV (default fs)] b", Passed, "", 1600 * time.Millisecond},
		{"External Storage [Driver: x] [Testpattern: Dynamic PV (default fs)] a", Passed, "", time.Second},
		{"c", Skipped, "\nbecause of this\nand more", 0},
	})
	const want = `2 passed, 0 failed, 1 skipped

## passed

- [Dynamic PV (default fs)] a (1s)
- [Dynamic PV (default fs)] b (2s)

## skipped

- c: because of this (0s)
`
	if diff := cmp.Diff(want, page); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// A capability counts if a test of it passed and none was skipped.
func TestUncovered(t *testing.T) {
	all := uncovered(nil)
	if len(all) != len(capabilities) {
		t.Errorf("without any test: %q", all)
	}
	name := "[Testpattern: Dynamic PV (block volmode)] volumes should store data"
	if got := uncovered([]Test{{Name: name, State: Passed}}); len(got) != len(all)-1 {
		t.Errorf("with one that passed: %q", got)
	}
	got := uncovered([]Test{{Name: name, State: Skipped, Message: "why"}})
	if !strings.Contains(strings.Join(got, "\n"), "skipped: "+name+": why") {
		t.Errorf("with one that was skipped: %q", got)
	}
}

// All that driver.yaml claims is in the list, under the same name.
func TestCapabilities_OfDefinition(t *testing.T) {
	var definition struct {
		DriverInfo struct{ Capabilities map[string]bool }
	}
	if err := yaml.Unmarshal(driver, &definition); err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{"controllerExpansion": true, "nodeExpansion": true} // what offline and online stand for
	for _, c := range capabilities {
		listed[c.name] = true
		if _, err := regexp.Compile(c.tests); err != nil {
			t.Error(err)
		}
	}
	for name, claimed := range definition.DriverInfo.Capabilities {
		if claimed && !listed[name] {
			t.Errorf("driver.yaml claims %s, of which no test is named", name)
		}
	}
}
