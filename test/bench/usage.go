package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// usage is what the processes that serve an image took for a load. The zero value is that
// of a contender without processes of its own.
type usage struct {
	idleBytes, busyBytes int64         // resident: before the load, and at most until its end
	processor            time.Duration // user and system, during the load
	operations           int64
}

// perOperation is usage as it is reported: nil if there is none.
func (u usage) perOperation() *costs {
	if u.operations == 0 {
		return nil
	}
	return &costs{
		Micros:  float64(u.processor.Nanoseconds()) / 1000 / float64(u.operations),
		IdleMiB: float64(u.idleBytes) / float64(mib1),
		BusyMiB: float64(u.busyBytes) / float64(mib1),
	}
}

// costs are what processes that serve an image took.
type costs struct {
	Micros  float64 `json:"processorMicrosecondsPerOperation"`
	IdleMiB float64 `json:"idleMiB"` // resident memory
	BusyMiB float64 `json:"busyMiB"`
}

// medianCosts returns the median of each cost; nil if there are none.
func medianCosts(list []costs) *costs {
	if len(list) == 0 {
		return nil
	}
	of := func(get func(costs) float64) float64 {
		var values []float64
		for _, c := range list {
			values = append(values, get(c))
		}
		return median(values)
	}
	return &costs{
		Micros:  of(func(c costs) float64 { return c.Micros }),
		IdleMiB: of(func(c costs) float64 { return c.IdleMiB }),
		BusyMiB: of(func(c costs) float64 { return c.BusyMiB }),
	}
}

// watchLoad runs a load and measures what it takes of processes.
func watchLoad(pids []int, run func() (rate, error)) (rate, usage, error) {
	var u usage
	if len(pids) == 0 {
		r, err := run()
		return r, u, err
	}
	forgetMost(pids)
	var err error
	if u.idleBytes, err = resident(pids, residentNow); err != nil {
		return rate{}, u, err
	}
	before, err := processorTime(pids)
	if err != nil {
		return rate{}, u, err
	}
	r, err := run()
	if err != nil {
		return r, u, err
	}
	after, err := processorTime(pids)
	if err != nil {
		return r, u, err
	}
	u.processor, u.operations = after-before, r.operations
	u.busyBytes, err = resident(pids, residentMost)
	return r, u, err
}

// forgetMost makes processes' memory at this moment the most that they have had.
func forgetMost(pids []int) {
	const resetPeak = "5"
	for _, pid := range pids {
		// Where it cannot be done, what is reported counts from the start of the process.
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte(resetPeak), 0)
	}
}

// Lines of proc(5)'s status.
const (
	residentNow  = "VmRSS:"
	residentMost = "VmHWM:"
)

// resident returns how much memory processes have together, or had at most.
func resident(pids []int, line string) (sum int64, err error) {
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		n, err := parseResident(string(text), line)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// parseResident reads a line of proc(5)'s status.
func parseResident(status, name string) (int64, error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, name); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("the process has no %s", strings.TrimSuffix(name, ":"))
}

// processorTime returns what processes have used of processors until now.
func processorTime(pids []int) (sum time.Duration, err error) {
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		t, err := parseProcessorTime(string(text))
		if err != nil {
			return 0, fmt.Errorf("process %d: %w", pid, err)
		}
		sum += t
	}
	return sum, nil
}

const (
	// tick is the unit of times in proc(5)'s stat, on every architecture that Go runs on.
	tick = 10 * time.Millisecond
	// userField and systemField count from the field behind the program's name, which may
	// contain anything.
	userField, systemField = 11, 12
)

// parseProcessorTime reads user and system time of proc(5)'s stat.
func parseProcessorTime(stat string) (time.Duration, error) {
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	if len(fields) <= systemField {
		return 0, fmt.Errorf("stat has %d fields behind the name, want more than %d", len(fields), systemField)
	}
	var ticks int64
	for _, field := range []string{fields[userField], fields[systemField]} {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("processor time: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick, nil
}
