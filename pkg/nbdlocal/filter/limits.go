package filter

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Limits bound what passes a Limiter. Reads, writes, zeroing and discarding count
// together. The zero value bounds nothing.
type Limits struct {
	// IOPS is how many requests may begin in a second, at least MinIOPS; 0: any number.
	IOPS int64 `json:"iops,omitempty"`
	// BytesPerSecond is how many bytes may be read and written in a second, at least
	// MinBytesPerSecond; 0: any number. Zeroing and discarding move none.
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty"`
	// BurstMillis says how much may be saved up while little is asked for: so many
	// milliseconds' worth, at most MaxBurstMillis; 0 is DefaultBurst.
	BurstMillis int64 `json:"burstMillis,omitempty"`
}

const (
	// MinIOPS and MinBytesPerSecond are low enough for any sensible limit, and high
	// enough for what a kernel has queued to be done before somebody takes the
	// device for dead.
	MinIOPS           = 10
	MinBytesPerSecond = 1 << 20
	// MaxBurstMillis is an hour.
	MaxBurstMillis = 3600 * 1000
	// DefaultBurst is short enough not to be noticed beside the limit, and longer
	// than a thread takes to be woken.
	DefaultBurst = 100 * time.Millisecond
)

// Validate returns nil for limits that can be kept; else an error that wraps
// block.ErrInvalid and says what would be accepted.
func (l Limits) Validate() error {
	switch {
	case l.IOPS != 0 && l.IOPS < MinIOPS:
		return fmt.Errorf("limit of %d requests per second: %w: want at least %d, or 0 for none", l.IOPS, block.ErrInvalid, MinIOPS)
	case l.BytesPerSecond != 0 && l.BytesPerSecond < MinBytesPerSecond:
		return fmt.Errorf("limit of %d bytes per second: %w: want at least %d, or 0 for none", l.BytesPerSecond, block.ErrInvalid, MinBytesPerSecond)
	case l.BurstMillis < 0 || l.BurstMillis > MaxBurstMillis:
		return fmt.Errorf("burst of %d milliseconds: %w: want at most %d, or 0 for %d", l.BurstMillis, block.ErrInvalid, MaxBurstMillis, DefaultBurst.Milliseconds())
	}
	return nil
}

// None says whether the limits bound nothing.
func (l Limits) None() bool { return l.IOPS == 0 && l.BytesPerSecond == 0 }

// Burst returns how long limits may be saved up for.
func (l Limits) Burst() time.Duration {
	if l.BurstMillis == 0 {
		return DefaultBurst
	}
	return time.Duration(l.BurstMillis) * time.Millisecond
}

// String says the limits in words.
func (l Limits) String() string {
	if l.None() {
		return "none"
	}
	var parts []string
	if l.IOPS > 0 {
		parts = append(parts, strconv.FormatInt(l.IOPS, 10)+" requests/s")
	}
	if l.BytesPerSecond > 0 {
		parts = append(parts, strconv.FormatInt(l.BytesPerSecond, 10)+" bytes/s")
	}
	return strings.Join(parts, ", ") + " with bursts of " + l.Burst().String()
}
