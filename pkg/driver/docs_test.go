package driver

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What docs/parameters.md lists is what is accepted, no more and no less.
func TestDocs_Parameters(t *testing.T) {
	data, err := os.ReadFile("../../docs/parameters.md")
	if err != nil {
		t.Fatal(err)
	}
	for table, accepted := range map[string][]string{"parameters": parameterNames, "mutable": mutableNames} {
		_, rest, found := strings.Cut(string(data), "<!-- "+table+": begin -->")
		text, _, ended := strings.Cut(rest, "<!-- "+table+": end -->")
		if !found || !ended {
			t.Fatalf("there is no table of %s", table)
		}
		var listed []string
		for _, match := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(text, -1) {
			listed = append(listed, match[1])
		}
		slices.Sort(listed)
		if diff := cmp.Diff(slices.Sorted(slices.Values(accepted)), listed); diff != "" {
			t.Errorf("%s (-accepted +listed):\n%s", table, diff)
		}
		for _, names := range [][]string{transports, imageModes} {
			for _, name := range names {
				if table == "parameters" && !strings.Contains(text, "`"+name+"`") && !strings.Contains(text, "`"+name+":") {
					t.Errorf("%s does not say %s", table, name)
				}
			}
		}
	}
}
