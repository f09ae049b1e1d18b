package metrics

import (
	"context"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// Source is whose attachments are shown: a supervisor.Supervisor, or a Client of one.
// Stats may take as long as ctx lets it.
type Source interface {
	List(ctx context.Context) ([]supervisor.Attachment, error)
	Stats(ctx context.Context, id string) (supervisor.ServerStats, error)
}

const (
	// askPatience is how long a scrape waits for the servers, which answer within a
	// millisecond or, while their stores hang, a little more than two seconds.
	askPatience = 4 * time.Second
	// askAtOnce is how many servers are asked at the same time.
	askAtOnce = 32
)

// Collector collects the metrics of a Source's attachments.
type Collector struct {
	source   Source
	version  string
	patience time.Duration
}

// NewCollector returns a collector. The version is what the build's metric says.
func NewCollector(source Source, version string) *Collector {
	return &Collector{source: source, version: version, patience: askPatience}
}

// metric is a description, and what kind of value goes with it.
type metric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// all are the metrics' descriptions, in the order in which docs/metrics.md lists them.
var all []Description

// Description describes a metric, for the documentation.
type Description struct {
	Name   string
	Type   string // counter, gauge or histogram
	Help   string
	Labels []string

	desc *prometheus.Desc
}

// Descriptions returns all metrics that a Collector collects.
func Descriptions() []Description { return all }

func describe(name, kind, help string, labels ...string) *prometheus.Desc {
	desc := prometheus.NewDesc(name, help, labels, nil)
	all = append(all, Description{Name: name, Type: kind, Help: help, Labels: labels, desc: desc})
	return desc
}

func counter(name, help string, labels ...string) metric {
	return metric{describe(name, "counter", help, labels...), prometheus.CounterValue}
}

func gauge(name, help string, labels ...string) metric {
	return metric{describe(name, "gauge", help, labels...), prometheus.GaugeValue}
}

// ofVolume are the labels of every metric of a volume, and more.
func ofVolume(more ...string) []string {
	return append([]string{"volume", "device", "transport"}, more...)
}

var (
	buildInfo = gauge("csi_imgdisk_build_info", "Always 1; the labels say which build of the supervisor this is.", "version", "goversion")
	volumes   = gauge("csi_imgdisk_volumes", "Volumes that are attached to this node.")

	serving    = gauge("csi_imgdisk_volume_serving", "1 if the volume is being served, 0 if its requests wait or its device is lost.", ofVolume()...)
	answering  = gauge("csi_imgdisk_volume_server_answering", "1 if the volume's server has told its figures, 0 if none runs or it did not answer in time: metrics that only it knows are missing then.", ofVolume()...)
	restarts   = counter("csi_imgdisk_volume_server_restarts_total", "Starts of another server for the volume, including those that did not succeed.", ofVolume()...)
	recoveries = counter("csi_imgdisk_volume_recoveries_total", "Times that the device was given to another server after the one before had ended.", ofVolume()...)
	resident   = gauge("csi_imgdisk_volume_server_resident_memory_bytes", "Resident memory of the volume's server.", ofVolume()...)
	started    = gauge("csi_imgdisk_volume_server_start_time_seconds", "When the volume's server opened its image, in seconds since 1970.", ofVolume()...)

	operations = counter("csi_imgdisk_volume_operations_total", "Requests that have ended, well or not.", ofVolume("op")...)
	moved      = counter("csi_imgdisk_volume_bytes_total", "Bytes that requests have read, written, zeroed or discarded.", ofVolume("op")...)
	durations  = describe("csi_imgdisk_volume_operation_duration_seconds", "histogram", "How long the image took for requests, without the time that they waited for a limit.", ofVolume("op")...)
	failed     = counter("csi_imgdisk_volume_errors_total", "Requests that have failed, by the error that their users were told.", ofVolume("op", "errno")...)
	inFlight   = gauge("csi_imgdisk_volume_in_flight", "Requests that the image is carrying out.", ofVolume("op")...)
	stalls     = counter("csi_imgdisk_volume_stalls_total", "Requests that have ended and took longer than about a second (1.048576 s).", ofVolume("op")...)
	stalled    = gauge("csi_imgdisk_volume_stalled", "Requests that the image has been carrying out for longer than about a second (1.048576 s).", ofVolume("op")...)

	limitOps   = gauge("csi_imgdisk_volume_limit_operations_per_second", "The volume's limit of requests; missing without one.", ofVolume()...)
	limitBytes = gauge("csi_imgdisk_volume_limit_bytes_per_second", "The volume's limit of bytes read and written; missing without one.", ofVolume()...)
	throttled  = counter("csi_imgdisk_volume_throttled_operations_total", "Requests that have waited for the volume's limits.", ofVolume()...)
	waited     = counter("csi_imgdisk_volume_throttled_seconds_total", "Time that requests have waited for the volume's limits, together.", ofVolume()...)
	waiting    = gauge("csi_imgdisk_volume_throttled", "Requests that wait for the volume's limits.", ofVolume()...)

	size        = gauge("csi_imgdisk_volume_size_bytes", "Size of the block device.", ofVolume()...)
	allocated   = gauge("csi_imgdisk_volume_allocated_bytes", "Space that the volume's images occupy in the store, with what they share with others.", ofVolume()...)
	depth       = gauge("csi_imgdisk_volume_chain_depth", "Images that the volume's contents come from: 1 is an image alone.", ofVolume()...)
	tableHits   = counter("csi_imgdisk_volume_table_cache_hits_total", "Lookups of the image's tables that were answered from memory.", ofVolume()...)
	tableMisses = counter("csi_imgdisk_volume_table_cache_misses_total", "Lookups of the image's tables for which the store was read.", ofVolume()...)
)

// Describe implements prometheus.Collector.
func (c *Collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range all {
		descs <- d.desc
	}
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), c.patience)
	defer cancel()
	sink{out: out, labels: []string{c.version, runtime.Version()}}.put(buildInfo, 1)
	list, err := c.source.List(ctx)
	if err != nil {
		out <- prometheus.NewInvalidMetric(volumes.desc, err)
		return
	}
	sink{out: out}.put(volumes, float64(len(list)))
	var asked sync.WaitGroup
	slots := make(chan struct{}, askAtOnce)
	for _, at := range list {
		slots <- struct{}{}
		asked.Go(func() {
			defer func() { <-slots }()
			c.collect(ctx, sink{out, []string{at.ID, at.Device, at.Transport}}, at)
		})
	}
	asked.Wait()
}

// collect collects one attachment's metrics.
func (c *Collector) collect(ctx context.Context, to sink, at supervisor.Attachment) {
	isServed := at.Phase == supervisor.Serving
	to.put(serving, truth(isServed))
	to.put(restarts, float64(at.Restarts))
	to.put(recoveries, float64(at.Recoveries))
	to.put(size, float64(at.SizeBytes))
	if bytes, ok := residentBytes(at.PID); ok {
		to.put(resident, float64(bytes))
	}
	if at.PID == 0 {
		to.put(answering, 0)
		return
	}
	stats, err := c.source.Stats(ctx, at.ID)
	to.put(answering, truth(err == nil))
	if err != nil {
		return
	}
	to.put(started, float64(stats.Since.UnixMilli())/1000)
	to.requests(stats.Requests)
	to.limits(stats.Limits, stats.Waits)
	if image := stats.Image; image != nil {
		to.image(*image)
	}
}

// sink takes metrics with the same first labels.
type sink struct {
	out    chan<- prometheus.Metric
	labels []string
}

func (s sink) put(m metric, value float64, more ...string) {
	s.out <- prometheus.MustNewConstMetric(m.desc, m.kind, value, s.with(more)...)
}

func (s sink) with(more []string) []string {
	return append(s.labels[:len(s.labels):len(s.labels)], more...)
}

// commonErrno is shown also while there are no such errors, so that the first one is
// an increase.
const commonErrno = "EIO"

func (s sink) requests(figures filter.Figures) {
	for _, op := range filter.Ops {
		f, name := figures.Op(op), op.String()
		s.put(operations, float64(f.Count()), name)
		s.put(moved, float64(f.Bytes), name)
		s.put(inFlight, float64(f.InFlight), name)
		s.put(stalls, float64(f.Stalls()), name)
		s.put(stalled, float64(f.Stalled), name)
		s.put(failed, float64(f.Errors[commonErrno]), name, commonErrno)
		for errno, n := range f.Errors {
			if errno != commonErrno {
				s.put(failed, float64(n), name, errno)
			}
		}
		s.histogram(f, name)
	}
}

// histogram shows every second bucket: each is four times the one before, which is
// enough to see where time goes, at half the cost to who stores it.
func (s sink) histogram(f filter.OpFigures, op string) {
	buckets := map[float64]uint64{}
	total := f.Count()
	for i := 0; i <= filter.Buckets-2; i += 2 {
		buckets[filter.BucketBound(i).Seconds()] = total - f.Latency.Above(i)
	}
	s.out <- prometheus.MustNewConstHistogram(durations, total, float64(f.Nanoseconds)/1e9, buckets, s.with([]string{op})...)
}

func (s sink) limits(limits filter.Limits, waits filter.Waits) {
	if limits.IOPS > 0 {
		s.put(limitOps, float64(limits.IOPS))
	}
	if limits.BytesPerSecond > 0 {
		s.put(limitBytes, float64(limits.BytesPerSecond))
	}
	s.put(throttled, float64(waits.Delayed))
	s.put(waited, float64(waits.Nanoseconds)/1e9)
	s.put(waiting, float64(waits.Waiting))
}

func (s sink) image(image supervisor.ImageStats) {
	if image.AllocatedBytes > 0 {
		s.put(allocated, float64(image.AllocatedBytes))
	}
	s.put(depth, float64(image.Layers))
	s.put(tableHits, float64(image.TableHits))
	s.put(tableMisses, float64(image.TableMisses))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// residentBytes returns a process's resident memory: the second number of proc(5)'s
// statm, in pages.
func residentBytes(pid int) (int64, bool) {
	if pid == 0 {
		return 0, false
	}
	statm, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0, false
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0, false
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize()), err == nil
}
