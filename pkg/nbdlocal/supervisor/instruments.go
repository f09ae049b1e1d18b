package supervisor

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
)

// ImageStats are what a server's device tells of itself beside block.Info.
type ImageStats struct {
	// TableHits and TableMisses count lookups in the cache of the image's tables.
	TableHits   int64 `json:"tableHits"`
	TableMisses int64 `json:"tableMisses"`
	// AllocatedBytes is the space that the image occupies with all that it stands on; 0
	// if that is not known.
	AllocatedBytes int64 `json:"allocatedBytes"`
	// Layers is how many images the device's contents come from.
	Layers int `json:"layers"`
}

// DebugInfo describes the inside of a process.
type DebugInfo struct {
	Version        string `json:"version"`
	Go             string `json:"go"`
	Goroutines     int    `json:"goroutines"`
	HeapBytes      uint64 `json:"heapBytes"`      // live and not yet collected
	StackBytes     uint64 `json:"stackBytes"`     // of goroutines
	RuntimeBytes   uint64 `json:"runtimeBytes"`   // all that the runtime has from the kernel
	Collections    uint32 `json:"collections"`    // of garbage
	Stacks         string `json:"stacks"`         // of goroutines, the first maxStackBytes
	StacksComplete bool   `json:"stacksComplete"` // these are all
}

const (
	// maxStackBytes keeps DebugInfo within a message.
	maxStackBytes = 40 << 10
	// imagePatience is how long an answer with statistics waits for the image's.
	imagePatience = 2 * time.Second
	// ownLimitsInterval is how often a device is asked for its own limits.
	ownLimitsInterval = time.Second
	// limitsEnv is the environment variable in which a server gets the limits that it
	// begins with, as JSON.
	limitsEnv = "IMGDISK_LIMITS"
)

// instruments are what a server measures its device with, and limits it by.
type instruments struct {
	meter   *filter.Meter
	limiter *filter.Limiter
	image   lately[imageReport]

	mu     sync.Mutex
	forced *filter.Limits       // by the supervisor; nil: the device's own count
	own    func() filter.Limits // nil: it has none
}

// imageReport is what is asked of an open image, which may hang as its store does.
type imageReport struct {
	device json.RawMessage // of Opened.Stats
	image  *ImageStats     // of Opened.Image
	err    error
}

// instrument puts the filters before the device that has just been opened.
func (s *server) instrument() {
	i := &s.instruments
	opened := s.device
	i.meter = filter.NewMeter(opened.Device)
	i.limiter = filter.NewLimiter(i.meter)
	i.image.read = func() imageReport { return report(opened) }
	i.own, i.forced = opened.Limits, startLimits()
	i.applyLimits()
	s.device.Device = i.limiter
	if i.own != nil {
		go i.followOwnLimits(s.ended)
	}
}

// startLimits returns the limits that the supervisor gave the process to begin with.
func startLimits() *filter.Limits {
	text := os.Getenv(limitsEnv)
	if text == "" {
		return nil
	}
	var limits filter.Limits
	err := json.Unmarshal([]byte(text), &limits)
	if err == nil {
		err = limits.Validate()
	}
	if err != nil {
		slog.Warn("the limits that the server was started with are not understood", "limits", text, "error", err)
		return nil
	}
	return &limits
}

func report(opened Opened) imageReport {
	var r imageReport
	if opened.Stats != nil {
		r.device, r.err = json.Marshal(opened.Stats())
	}
	if opened.Image != nil {
		image := opened.Image()
		r.image = &image
	}
	return r
}

// applyLimits sets the limits that count now.
func (i *instruments) applyLimits() {
	i.mu.Lock()
	defer i.mu.Unlock()
	var limits filter.Limits
	switch {
	case i.forced != nil:
		limits = *i.forced
	case i.own != nil:
		limits = i.own()
	}
	if err := limits.Validate(); err != nil {
		slog.Warn("limits ignored", "error", err)
		return
	}
	if limits != i.limiter.Limits() {
		slog.Info("limits", "limits", limits.String())
		i.limiter.Set(limits)
	}
}

// followOwnLimits has the device's own limits apply when they change.
func (i *instruments) followOwnLimits(ended <-chan struct{}) {
	ticker := time.NewTicker(ownLimitsInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ended:
			return
		case <-ticker.C:
			i.applyLimits()
		}
	}
}

// setLimits makes the supervisor's limits count; with nil the device's own do.
func (s *server) setLimits(limits *filter.Limits) error {
	if err := s.waitOpen(); err != nil {
		return err
	}
	if limits != nil {
		if err := limits.Validate(); err != nil {
			return err
		}
	}
	i := &s.instruments
	i.mu.Lock()
	i.forced = limits
	i.mu.Unlock()
	i.applyLimits()
	return nil
}

// readInto adds what the instruments show to a server's statistics.
func (i *instruments) readInto(stats *ServerStats) error {
	stats.Requests, stats.Limits, stats.Waits = i.meter.Figures(), i.limiter.Limits(), i.limiter.Waits()
	r, ok := i.image.get(imagePatience)
	if !ok {
		return nil // its store hangs: everything else is still worth knowing
	}
	stats.Device, stats.Image = r.device, r.image
	return r.err
}

// lately keeps what a function has last returned that may hang. read is set before use.
type lately[T any] struct {
	read func() T

	mu      sync.Mutex
	last    T
	known   bool
	reading chan struct{} // closed when the call of read that runs has returned; nil: none runs
}

// get returns what read returns. If that takes longer than patience, or hangs since an
// earlier get, it returns what it returned last; false if it never has.
func (l *lately[T]) get(patience time.Duration) (T, bool) {
	l.mu.Lock()
	hangs := l.reading != nil
	if !hangs {
		l.reading = make(chan struct{})
		go l.update()
	}
	reading := l.reading
	l.mu.Unlock()
	if !hangs {
		select {
		case <-reading:
		case <-time.After(patience):
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last, l.known
}

func (l *lately[T]) update() {
	v := l.read()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last, l.known = v, true
	close(l.reading)
	l.reading = nil
}

// debugInfo describes this process.
func debugInfo(version string) *DebugInfo {
	stacks := make([]byte, maxStackBytes)
	n := runtime.Stack(stacks, true)
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	return &DebugInfo{
		Version: version, Go: runtime.Version(), Goroutines: runtime.NumGoroutine(),
		HeapBytes: mem.HeapAlloc, StackBytes: mem.StackInuse, RuntimeBytes: mem.Sys, Collections: mem.NumGC,
		Stacks: string(stacks[:n]), StacksComplete: n < len(stacks),
	}
}

// limitsEnviron is what the environment of a server needs to have for limits.
func limitsEnviron(limits *filter.Limits) []string {
	if limits == nil {
		return nil
	}
	return []string{limitsEnv + "=" + string(marshal(limits))}
}

// LimitsRequest asks for a volume's limits to be changed.
type LimitsRequest struct {
	// Limits count instead of what the volume itself says; nil: what it says counts.
	Limits *filter.Limits `json:"limits"`
}

func (r LimitsRequest) validate() error {
	if r.Limits == nil {
		return nil
	}
	return r.Limits.Validate()
}

// handleLimits records an attachment's limits, and gives them to its server. A server
// that is to come gets them when it starts.
func (a *attachment) handleLimits(c *command) error {
	ctx, cancel := a.stepContext(c.client)
	defer cancel()
	if a.rec.Phase == "" || a.rec.Phase == Lost {
		return fmt.Errorf("limits of %s: it is not attached: %w", a.id, block.ErrBusy)
	}
	before := a.rec.Request.Limits
	a.rec.Request.Limits = c.limits
	if err := a.save(); err != nil {
		a.rec.Request.Limits = before
		return err
	}
	if a.proc == nil || !a.proc.alive() {
		return nil
	}
	if err := a.proc.setLimits(ctx, c.limits); err != nil && a.proc.alive() {
		return fmt.Errorf("limits of %s are noted, and its server does not obey: %w", a.id, err)
	}
	return nil
}
