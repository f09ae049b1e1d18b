package formattest_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// A suite that cannot fail proves nothing: each of these mistakes in a format is found by
// the part of it that is there for it.
func TestSuite_FindsBugs(t *testing.T) {
	if os.Getenv(bugVariable) != "" {
		t.Skip("this is the process that has the bug")
	}
	if testing.Short() {
		t.Skip("it takes long")
	}
	for bug, part := range map[toyBug]string{
		"run is too long":              "Model",
		"parent is ignored":            "Model",
		"zero is absent":               "Model",
		"space is given twice":         "Model",
		"space is lost":                "Reuse",
		"no lock":                      "Locks",
		"no space is another error":    "FullStore",
		"header decides about memory":  "Hostile",
		"panic at a bad entry":         "Hostile",
		"freed at once":                "CrashSweep",
		"commit writes nothing":        "CrashSweep",
		"odd length is refused":        "CrashSweep",
		"create without sync":          "CrashSweep",
		"grow takes any size":          "Grow",
		"changes are not counted":      "KillSweep",
		"failed create leaves a file":  "ErrorSweep",
		"failed open leaks the file":   "ErrorSweep",
		"error is swallowed":           "ErrorSweep",
		"stream can be changed":        "stream/Convert",
		"inflates too little":          "Model",
		"parent's format is forgotten": "on_raw/Model",
		"shrink loses what stays":      "Shrink",
		"shrink is not durable":        "Shrink",
		"all tables are kept":          "Memory",
		"repair harms data":            "Repair",
		"rebase writes nothing":        "Rebase",
		"no password is needed":        "encrypted/Secret",
		"stored as plain text":         "encrypted/Secret",
		"rebase takes two steps":       "Rebase",
	} {
		t.Run(string(bug), func(t *testing.T) {
			kind, part, ok := strings.Cut(part, "/")
			if !ok {
				kind, part = "toy", kind
			}
			const tries = 5 // chance decides what a crash leaves
			for range tries {
				cmd := exec.Command(os.Args[0], "-test.run=^TestConformance$/^"+kind+"$/^"+part+"$", "-test.count=1")
				cmd.Env = append(os.Environ(), bugVariable+"="+string(bug))
				if err := cmd.Run(); err != nil {
					return
				}
			}
			t.Errorf("%s does not find it in %d tries", part, tries)
		})
	}
}
