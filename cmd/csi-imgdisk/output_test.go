package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestProgressBar(t *testing.T) {
	for _, c := range []struct {
		done int64 // of 100 MiB, after 10 s
		want string
	}{
		{0, "  0 %"},
		{25, " 25 %, 2.5 MiB/s, 30s left"},
		{100, "100 %, 10 MiB/s"},
	} {
		start := time.Now()
		m := &meter{what: "converting", unit: inBytes, start: start}
		bar := progressBar(m.what, m.pace(start.Add(10*time.Second), c.done<<20, 100<<20))
		if !strings.HasSuffix(bar, c.want) || strings.Count(bar, "━") != int(c.done*progressColumns/100) {
			t.Errorf("%d of 100: %q, want %q", c.done, bar, c.want)
		}
		if n := utf8.RuneCountInString(bar); n > 79 {
			t.Errorf("%d of 100: %d columns", c.done, n)
		}
	}
}

// What was skipped at the beginning does not count for long.
func TestMeter_RateOfTheLastSeconds(t *testing.T) {
	start := time.Now()
	m := &meter{start: start}
	m.pace(start.Add(time.Second), 1<<40, 2<<40)
	var p pace
	for s := 2; s <= 30; s++ {
		p = m.pace(start.Add(time.Duration(s)*time.Second), 1<<40+int64(s-1)<<20, 2<<40)
	}
	if p.perSecond != 1<<20 {
		t.Errorf("%.0f bytes a second, want %d", p.perSecond, 1<<20)
	}
}

func TestMeter_Lines(t *testing.T) {
	var out bytes.Buffer
	m := &meter{what: "copying", unit: inBytes, out: &out, start: time.Now().Add(-2 * time.Second), period: linePeriod}
	m.show = m.line
	m.progress(1<<20, 4<<20)
	m.progress(2<<20, 4<<20) // too soon after the first
	m.progress(4<<20, 4<<20)
	m.end()
	if text := out.String(); strings.Count(text, "\n") != 2 || !strings.HasPrefix(text, "copying:  25 %, ") || !strings.Contains(text, "copying: 100 %") {
		t.Errorf("lines:\n%s", text)
	}
	out.Reset()
	m.show = m.event
	m.progress(4<<20, 4<<20)
	var event map[string]any
	if err := json.Unmarshal(out.Bytes(), &event); err != nil || event["done"] != 4194304.0 || event["event"] != "progress" {
		t.Errorf("event %s: %v", out.String(), err)
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
