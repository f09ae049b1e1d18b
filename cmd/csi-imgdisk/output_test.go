package main

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestProgressBar(t *testing.T) {
	for _, c := range []struct {
		done, total int64
		want        string
	}{
		{0, 100, "  0 %"},
		{25, 100, " 25 %, 30s left"},
		{100, 100, "100 %"},
	} {
		bar := progressBar("copying", c.done, c.total, 10*time.Second)
		if !strings.HasSuffix(bar, c.want) || strings.Count(bar, "━") != int(c.done*progressColumns/c.total) {
			t.Errorf("%d of %d: %q, want %q", c.done, c.total, bar, c.want)
		}
		if n := utf8.RuneCountInString(bar); n > 79 {
			t.Errorf("%d of %d: %d columns", c.done, c.total, n)
		}
	}
}

func TestHumanSize(t *testing.T) {
	for bytes, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 30: "10 GiB", 1 << 62: "4 EiB",
	} {
		if got := humanSize(bytes); got != want {
			t.Errorf("%d: %q, want %q", bytes, got, want)
		}
	}
}

func TestSizeValue(t *testing.T) {
	for text, want := range map[string]int64{"512": 512, "64K": 64 << 10, "10Gi": 10 << 30, "10G": 10 << 30} {
		var s sizeValue
		if err := s.Set(text); err != nil || int64(s) != want {
			t.Errorf("%s: %d, %v, want %d", text, s, err, want)
		}
	}
	for _, text := range []string{"", "-1", "1.5.5G", "99999999999T", "G"} {
		if err := new(sizeValue).Set(text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}
