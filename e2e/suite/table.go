package suite

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Table is a page in Markdown: numbers, and each test by name under what came of it.
func Table(tests []Test) string {
	var page strings.Builder
	byState := map[State][]Test{}
	for _, t := range tests {
		byState[t.State] = append(byState[t.State], t)
	}
	fmt.Fprintf(&page, "%d passed, %d failed, %d skipped\n", len(byState[Passed]), len(byState[Failed]), len(byState[Skipped]))
	for _, state := range []State{Failed, Passed, Skipped} {
		list := byState[state]
		if len(list) == 0 {
			continue
		}
		slices.SortFunc(list, func(a, b Test) int { return strings.Compare(a.Name, b.Name) })
		fmt.Fprintf(&page, "\n## %s\n\n", state)
		for _, t := range list {
			fmt.Fprintf(&page, "- %s", shortName(t.Name))
			if state != Passed {
				fmt.Fprintf(&page, ": %s", firstLine(t.Message))
			}
			fmt.Fprintf(&page, " (%s)\n", t.Time.Round(time.Second))
		}
	}
	return page.String()
}

// shortName leaves out what all names have.
func shortName(name string) string {
	if _, rest, ok := strings.Cut(name, "[Testpattern: "); ok {
		return "[" + rest
	}
	return name
}

// firstLine is the first line of a message that says something.
func firstLine(message string) string {
	for line := range strings.Lines(message) {
		if line = strings.TrimSpace(line); line != "" {
			return line
		}
	}
	return "no message"
}
