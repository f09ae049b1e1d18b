package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/filter"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// answerPatience is how long servers may take to tell their figures.
const answerPatience = 4 * time.Second

func newDevicesCommand() *cobra.Command {
	var run runDir
	var watch bool
	interval := time.Second
	cmd := &cobra.Command{
		Use:   "devices",
		Short: "List the block devices made from images and volumes, and what they do",
		Long: `Lists the block devices made from images and volumes. READ, WRITTEN, IN FLIGHT and ERRORS count
since the server that is in the column PID began; VERSION is that of its program, which
csi-imgdisk upgrade replaces.

With --watch it shows what happens on them, as often as --interval says, until it is
interrupted: requests and bytes per second, the time within which half and 99 of 100
requests were carried out by the image, how many are being carried out and how many wait
for a limit, and how many failed. With -o json each interval is an object on a line.`,
		Example: "  csi-imgdisk devices --watch\n  csi-imgdisk devices limits /dev/nbd0 --iops 500 --bandwidth 100Mi",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s := &sampler{client: runningSupervisor(run)}
			if watch {
				return watchDevices(cmd, s, interval)
			}
			devices, err := s.take(cmd.Context())
			if err != nil {
				return err
			}
			return emit(cmd, devices, func(p *printer) { printDevices(p, devices) })
		},
	}
	addRunDirFlag(cmd, &run)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on showing what happens")
	cmd.Flags().DurationVar(&interval, "interval", interval, "how often, with --watch; at least 100ms")
	cmd.AddCommand(newDeviceLimitsCommand(), newDeviceDebugCommand())
	return cmd
}

// deviceStatus is an attached device and its figures as `devices` shows them.
type deviceStatus struct {
	deviceInfo
	// Totals are since the server began; nil if it does not tell.
	Totals *deviceTotals `json:"totals,omitempty"`
	// Rates are of the last interval; nil in the first one, and when the server changed.
	Rates *deviceRates `json:"rates,omitempty"`
}

// deviceTotals are counters, and what is the case now.
type deviceTotals struct {
	Since          time.Time      `json:"since"`
	Operations     uint64         `json:"operations"`
	ReadBytes      uint64         `json:"read-bytes"`
	WrittenBytes   uint64         `json:"written-bytes"`
	Errors         uint64         `json:"errors"`
	Stalls         uint64         `json:"stalls"`
	InFlight       int            `json:"in-flight"`
	Stalled        int            `json:"stalled"`
	Throttled      int            `json:"throttled"`
	Limits         *filter.Limits `json:"limits,omitempty"`
	AllocatedBytes int64          `json:"allocated-bytes,omitempty"`
	Layers         int            `json:"layers,omitempty"`
}

// deviceRates are per second; flushes are not counted.
type deviceRates struct {
	Seconds      float64 `json:"seconds"` // of the interval
	IOPS         float64 `json:"iops"`
	ReadBytes    float64 `json:"read-bytes"`
	WrittenBytes float64 `json:"written-bytes"`
	Errors       uint64  `json:"errors"` // in the interval
	P50Micros    float64 `json:"p50-microseconds"`
	P99Micros    float64 `json:"p99-microseconds"`
}

// sampler asks for figures again and again, and remembers the last ones.
type sampler struct {
	client *supervisor.Client
	before map[string]deviceSample
}

// deviceSample are a server's figures at a time; none if stats is nil.
type deviceSample struct {
	at    time.Time
	stats *supervisor.ServerStats
}

// take returns the devices as they are; none if no supervisor runs.
func (s *sampler) take(ctx context.Context) ([]deviceStatus, error) {
	list, err := s.client.List(ctx)
	if err != nil && !errors.Is(err, supervisor.ErrNotRunning) {
		return nil, err
	}
	samples := s.ask(ctx, list)
	devices := []deviceStatus{}
	now := map[string]deviceSample{}
	for i, att := range list {
		d := deviceStatus{deviceInfo: newDeviceInfo(att)}
		if stats := samples[i].stats; stats != nil {
			d.Totals = newDeviceTotals(stats)
			d.Rates = newDeviceRates(s.before[att.ID], samples[i])
		}
		now[att.ID] = samples[i]
		devices = append(devices, d)
	}
	s.before = now
	return devices, nil
}

// ask asks all servers that serve, at the same time. Those that do not answer in time
// have no stats.
func (s *sampler) ask(ctx context.Context, list []supervisor.Attachment) []deviceSample {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	samples := make([]deviceSample, len(list))
	var asked sync.WaitGroup
	for i, att := range list {
		if att.PID == 0 {
			continue
		}
		asked.Go(func() {
			stats, err := s.client.Stats(ctx, att.ID)
			if err == nil {
				samples[i] = deviceSample{time.Now(), &stats}
			}
		})
	}
	asked.Wait()
	return samples
}

func newDeviceTotals(stats *supervisor.ServerStats) *deviceTotals {
	all := stats.Requests.Total()
	t := &deviceTotals{
		Since: stats.Since, Operations: all.Count(), Errors: all.Failed(), Stalls: all.Stalls(),
		ReadBytes: stats.Requests.Op(filter.Read).Bytes, WrittenBytes: stats.Requests.Op(filter.Write).Bytes,
		InFlight: all.InFlight, Stalled: all.Stalled, Throttled: stats.Waits.Waiting,
	}
	if !stats.Limits.None() {
		t.Limits = &stats.Limits
	}
	if stats.Image != nil {
		t.AllocatedBytes, t.Layers = stats.Image.AllocatedBytes, stats.Image.Layers
	}
	return t
}

// newDeviceRates returns nil if the samples are not of the same server.
func newDeviceRates(before, now deviceSample) *deviceRates {
	if before.stats == nil || !before.stats.Since.Equal(now.stats.Since) {
		return nil
	}
	r := &deviceRates{Seconds: now.at.Sub(before.at).Seconds()}
	if r.Seconds <= 0 {
		return nil
	}
	var latency filter.Latency
	for _, op := range filter.Ops {
		was, is := before.stats.Requests.Op(op), now.stats.Requests.Op(op)
		r.Errors += is.Failed() - was.Failed()
		if op != filter.Flush {
			latency = latency.Plus(is.Latency.Minus(was.Latency))
		}
		switch op {
		case filter.Read:
			r.ReadBytes = float64(is.Bytes-was.Bytes) / r.Seconds
		case filter.Write:
			r.WrittenBytes = float64(is.Bytes-was.Bytes) / r.Seconds
		}
	}
	r.IOPS = float64(latency.Count()) / r.Seconds
	r.P50Micros = micros(latency.Quantile(0.5))
	r.P99Micros = micros(latency.Quantile(0.99))
	return r
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// state says in which phase a device is, and why.
func (d deviceStatus) state() string {
	if d.Problem != "" {
		return d.Phase + ": " + d.Problem
	}
	return d.Phase
}

// notTold stands for figures that nobody has told.
const notTold = "-"

func printDevices(p *printer, devices []deviceStatus) {
	if len(devices) == 0 {
		p.line("no devices")
		return
	}
	var rows [][]string
	for _, d := range devices {
		row := []string{d.Device, humanSize(d.SizeBytes), d.Transport, strconv.Itoa(d.PID), cmp.Or(d.Version, notTold), strconv.Itoa(d.Restarts)}
		if t := d.Totals; t != nil {
			row = append(row, humanSize(int64(t.ReadBytes)), humanSize(int64(t.WrittenBytes)), strconv.Itoa(t.InFlight), strconv.FormatUint(t.Errors, 10))
		} else {
			row = append(row, notTold, notTold, notTold, notTold)
		}
		rows = append(rows, append(row, d.Image+d.Volume, d.state()))
	}
	p.table([]string{"DEVICE", "SIZE", "TRANSPORT", "PID", "VERSION", "RESTARTS", "READ", "WRITTEN", "IN FLIGHT", "ERRORS", "IMAGE OR VOLUME", "STATE"}, rows)
}

func newDeviceLimitsCommand() *cobra.Command {
	var run runDir
	var iops int64
	var bandwidth sizeValue
	var burst time.Duration
	var reset bool
	cmd := &cobra.Command{
		Use:   "limits DEVICE|FILE|VOLUME",
		Short: "Show or change how much a device may do in a second",
		Long: `Shows a device's limits, or changes them while it is in use. What is not given stays as it is;
0 takes a limit away. Limits count until the device is detached, or until --reset, with
which those that the volume itself has count again.`,
		Example: "  csi-imgdisk devices limits /dev/nbd0 --iops 500 --bandwidth 100Mi\n  csi-imgdisk devices limits /dev/nbd0 --reset",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := runningSupervisor(run)
			att, err := findAttachment(cmd.Context(), client, args[0])
			if err != nil {
				return err
			}
			changed := cmd.Flags().Changed
			switch {
			case reset:
				att, err = client.SetLimits(cmd.Context(), att.ID, nil)
			case changed("iops") || changed("bandwidth") || changed("burst"):
				att, err = changeLimits(cmd.Context(), client, att, func(l *filter.Limits) {
					if changed("iops") {
						l.IOPS = iops
					}
					if changed("bandwidth") {
						l.BytesPerSecond = int64(bandwidth)
					}
					if changed("burst") {
						l.BurstMillis = burst.Milliseconds()
					}
				})
			}
			if err != nil {
				return err
			}
			return showLimits(cmd, client, att)
		},
	}
	addRunDirFlag(cmd, &run)
	flags := cmd.Flags()
	flags.Int64Var(&iops, "iops", 0, fmt.Sprintf("requests per second, at least %d", filter.MinIOPS))
	flags.Var(&bandwidth, "bandwidth", fmt.Sprintf("bytes read and written per second, at least %s", humanSize(filter.MinBytesPerSecond)))
	flags.DurationVar(&burst, "burst", 0, fmt.Sprintf("how long limits can be saved up for while little happens; 0 is %v", filter.DefaultBurst))
	flags.BoolVar(&reset, "reset", false, "have the volume's own limits count")
	for _, name := range []string{"iops", "bandwidth", "burst"} {
		cmd.MarkFlagsMutuallyExclusive("reset", name)
	}
	return cmd
}

// changeLimits changes some of the limits that count now.
func changeLimits(ctx context.Context, client *supervisor.Client, att supervisor.Attachment, change func(*filter.Limits)) (supervisor.Attachment, error) {
	var limits filter.Limits
	if att.Limits != nil {
		limits = *att.Limits
	} else {
		stats, err := client.Stats(ctx, att.ID)
		if err != nil {
			return att, err
		}
		limits = stats.Limits
	}
	change(&limits)
	return client.SetLimits(ctx, att.ID, &limits)
}

// deviceLimits are a device's limits; 0 is none.
type deviceLimits struct {
	Device         string `json:"device"`
	IOPS           int64  `json:"iops"`
	BytesPerSecond int64  `json:"bandwidth"`
	BurstMillis    int64  `json:"burst-milliseconds"`
	// Own says that the limits are those of the volume itself.
	Own bool `json:"own"`
}

func showLimits(cmd *cobra.Command, client *supervisor.Client, att supervisor.Attachment) error {
	stats, err := client.Stats(cmd.Context(), att.ID)
	if err != nil {
		return err
	}
	l := stats.Limits
	shown := deviceLimits{
		Device: att.Device, IOPS: l.IOPS, BytesPerSecond: l.BytesPerSecond,
		BurstMillis: l.Burst().Milliseconds(), Own: att.Limits == nil,
	}
	return emit(cmd, shown, func(p *printer) {
		iops, bandwidth, source := "no limit", "no limit", "set on this machine"
		if l.IOPS > 0 {
			iops = strconv.FormatInt(l.IOPS, 10)
		}
		if l.BytesPerSecond > 0 {
			bandwidth = humanSize(l.BytesPerSecond) + "/s"
		}
		if shown.Own {
			source = "the volume's own"
		}
		p.table([]string{"DEVICE", "IOPS", "BANDWIDTH", "BURST", "SOURCE"}, [][]string{{att.Device, iops, bandwidth, l.Burst().String(), source}})
	})
}

func newDeviceDebugCommand() *cobra.Command {
	var run runDir
	cmd := &cobra.Command{
		Use:   "debug DEVICE|FILE|VOLUME",
		Short: "Show what the process that serves a device is doing: memory, goroutines and their stacks",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := runningSupervisor(run)
			att, err := findAttachment(cmd.Context(), client, args[0])
			if err != nil {
				return err
			}
			info, err := client.Debug(cmd.Context(), att.ID)
			if err != nil {
				return err
			}
			return emit(cmd, info, func(p *printer) {
				p.line("process %d, csi-imgdisk %s, %s", att.PID, info.Version, info.Go)
				p.line("heap %s, stacks %s, from the kernel %s, %d collections", humanSize(int64(info.HeapBytes)),
					humanSize(int64(info.StackBytes)), humanSize(int64(info.RuntimeBytes)), info.Collections)
				p.line("%d goroutines:\n\n%s", info.Goroutines, info.Stacks)
				if !info.StacksComplete {
					p.line("... and more")
				}
			})
		},
	}
	addRunDirFlag(cmd, &run)
	return cmd
}
