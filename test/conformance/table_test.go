package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestFuzzCounts(t *testing.T) {
	out := "ok   pkg/formats/vmdk FuzzImage: execs: 12\nFAIL pkg/formats/vmdk FuzzX\nok   pkg/formats/vmdk FuzzHeader: execs: 30\nok   pkg/formats/vhd FuzzImage: execs: 5\n"
	got := fuzzCounts([]byte(out))
	if len(got) != 2 || got["vmdk"] != 42 || got["vhd"] != 5 {
		t.Errorf("got %v, want vmdk 42 and vhd 5", got)
	}
}

// Reports of several processes add up, every kind has a row, and what failed is named.
func TestTable_Markdown(t *testing.T) {
	table := newTable([]report{
		{Format: "raw", Counts: map[string]int64{"Crashes": 3}},
		{Format: "raw", Counts: map[string]int64{"Crashes": 4, "Kills": 1}, Failed: []string{"TestConformance/raw/KillSweep"}},
	}, map[string]int64{"raw": 9})
	text := table.markdown(time.Minute, true)
	for _, want := range []string{"| raw |", " 7 |", " 9 |", "**Failed:** raw, TestConformance/raw/KillSweep", "SHORT=1"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for _, k := range bases() {
		if row := "| " + rowName(k.format.Name(), k.subformat) + " |"; !strings.Contains(text, row) {
			t.Errorf("no row %q", row)
		}
	}
}

func TestReplaceTable(t *testing.T) {
	page := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(page, []byte("before\n"+tableBegin+"old\n"+tableEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time changes nothing
		if err := replaceTable(page, "new\n"); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(page)
		if want := "before\n" + tableBegin + "\nnew\n\n" + tableEnd + "after\n"; err != nil || string(got) != want {
			t.Errorf("the page is %q, %v, want %q", got, err, want)
		}
	}
	if err := os.WriteFile(page, []byte("no markers"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceTable(page, "new"); err == nil {
		t.Error("a page without markers is accepted")
	}
}
