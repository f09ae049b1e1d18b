package suite

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
)

// Config says how the suite is to run.
type Config struct {
	Programs   *parts.StorageSuite
	Kubectl    string // a program
	Kubeconfig string
	Dir        string // for results.json, results.md and log.txt; it is made if it is not there

	// Full runs all tests. Otherwise only those run that capabilities name.
	Full bool

	// Processes is how many tests run at a time. Those that disturb others run alone, after
	// them, in any case. At least 1.
	Processes int

	// Log gets what ginkgo says, besides log.txt.
	Log io.Writer
}

//go:embed driver.yaml
var driver []byte

// limitedClass is what driver.yaml has as VolumeAttributesClass.
const limitedClass = `apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: imgdisk-limited}
driverName: csi.imgdisk.dev
parameters: {iops: "10000"}
`

// limit is how long all tests may take together, far longer than they do.
const limit = 10 * time.Hour

// Run runs the suite and returns what came of each test that was to run, in the order of
// their names. The error is of the run or of tests that failed; results are there also then. When
// ctx is done, tests under way clean up, which takes up to a minute, and the others are not begun.
func Run(ctx context.Context, c Config) ([]Test, error) {
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, err
	}
	definition := filepath.Join(c.Dir, "driver.yaml")
	if err := os.WriteFile(definition, driver, 0o644); err != nil {
		return nil, err
	}
	if err := c.apply(ctx, limitedClass); err != nil {
		return nil, err
	}
	raw := filepath.Join(c.Dir, "results.json")
	if err := os.Remove(raw); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	runErr := c.ginkgo(ctx, definition)
	tests, err := readResults(raw)
	if err != nil {
		return nil, errors.Join(runErr, err)
	}
	if err := os.WriteFile(filepath.Join(c.Dir, "results.md"), []byte(Table(tests)), 0o644); err != nil {
		return tests, err
	}
	if complaints := uncovered(tests); len(complaints) > 0 {
		runErr = errors.Join(runErr, errors.New(strings.Join(complaints, "\n")))
	}
	return tests, runErr
}

// apply makes objects in the cluster.
func (c Config) apply(ctx context.Context, objects string) error {
	cmd := exec.CommandContext(ctx, c.Kubectl, "--kubeconfig="+c.Kubeconfig, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(objects)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("kubectl apply: %w\n%s", err, out)
	}
	return nil
}

// ginkgo runs the tests; its error says that some failed, or that they could not run.
func (c Config) ginkgo(ctx context.Context, definition string) error {
	log, err := os.Create(filepath.Join(c.Dir, "log.txt"))
	if err != nil {
		return err
	}
	defer log.Close()
	out := io.MultiWriter(log, c.Log)
	args := []string{
		"--procs=" + strconv.Itoa(c.Processes), "--timeout=" + limit.String(), "--no-color", "--silence-skips",
		"--output-dir=" + c.Dir, "--json-report=results.json", "--grace-period=1m", "--poll-progress-after=10m",
	}
	args = append(args, c.focus()...)
	args = append(args, c.Programs.Suite, "--",
		"-kubeconfig="+c.Kubeconfig, "-kubectl-path="+c.Kubectl, "-storage.testdriver="+definition,
		"-provider=skeleton", "-num-nodes=2",
	)
	cmd := exec.CommandContext(ctx, c.Programs.Ginkgo, args...)
	cmd.Dir = c.Dir
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 2 * time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("ginkgo: %w", err)
	}
	return nil
}

// focus is which tests are to run.
func (c Config) focus() []string {
	if c.Full {
		return []string{"--focus=External.Storage"}
	}
	var args []string
	for _, capability := range capabilities {
		args = append(args, "--focus="+capability.tests)
	}
	return args
}

// State is what came of a test.
type State string

// What can come of a test.
const (
	Passed  State = "passed"
	Failed  State = "failed"
	Skipped State = "skipped" // by the test itself, which says why
)

// Test is one of the suite.
type Test struct {
	Name    string
	State   State
	Message string        // why it failed or was skipped
	Time    time.Duration // that it took
}

// readResults reads ginkgo's report.
func readResults(path string) ([]Test, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("ginkgo's report: %w", err)
	}
	var reports []struct {
		SpecReports []struct {
			ContainerHierarchyTexts           []string
			LeafNodeText, LeafNodeType, State string
			Failure                           struct{ Message string }
			RunTime                           time.Duration
		}
	}
	if err := json.Unmarshal(data, &reports); err != nil {
		return nil, fmt.Errorf("ginkgo's report %s: %w", path, err)
	}
	var tests []Test
	for _, report := range reports {
		for _, spec := range report.SpecReports {
			t := Test{
				Name:  strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " "),
				State: State(spec.State), Message: spec.Failure.Message, Time: spec.RunTime,
			}
			switch {
			case t.State == Skipped && t.Message == "", spec.State == "pending":
				continue // was not to run
			case spec.LeafNodeType != "It" && t.State == Passed:
				continue // preparations
			case t.State != Passed && t.State != Skipped:
				t.State = Failed // or timed out, panicked, interrupted
			}
			tests = append(tests, t)
		}
	}
	if len(tests) == 0 {
		return nil, fmt.Errorf("ginkgo's report %s has no test that was to run", path)
	}
	return tests, nil
}
