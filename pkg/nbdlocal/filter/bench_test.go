package filter

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// BenchmarkFilters says what a request costs that passes the filters, beside one that
// goes to the device directly.
func BenchmarkFilters(b *testing.B) {
	limited := func(limits Limits) func(block.Device) block.Device {
		return func(dev block.Device) block.Device {
			l := NewLimiter(NewMeter(dev))
			l.Set(limits)
			return l
		}
	}
	for _, bench := range []struct {
		name string
		wrap func(block.Device) block.Device
	}{
		{"none", func(dev block.Device) block.Device { return dev }},
		{"meter", func(dev block.Device) block.Device { return NewMeter(dev) }},
		{"meter+unlimited", limited(Limits{})},
		{"meter+limited", limited(Limits{IOPS: 1 << 40, BytesPerSecond: 1 << 50})},
	} {
		dev := bench.wrap(nullDevice{})
		b.Run(bench.name+"/alone", func(b *testing.B) {
			b.ReportAllocs()
			buf := make([]byte, 4096)
			for b.Loop() {
				_, _ = dev.ReadAt(buf, 0)
			}
		})
		b.Run(bench.name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				buf := make([]byte, 4096)
				for pb.Next() {
					_, _ = dev.ReadAt(buf, 0)
				}
			})
		})
	}
}

// nullDevice does nothing.
type nullDevice struct{ block.Device }

func (nullDevice) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }
