package main

import "slices"

// comparison is our figure beside another.
type comparison struct {
	Work    string  `json:"work"`
	Format  string  `json:"format"`
	Against string  `json:"against"` // a contender, or figures of ours
	Unit    string  `json:"unit"`
	Ours    float64 `json:"ours"`   // medians
	Theirs  float64 `json:"theirs"` //
	// Ratio is the median of the rounds' ratios; more than 1 is better than theirs,
	// whatever the unit. Low and High are the least and the greatest.
	Ratio  float64 `json:"ratio"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
	Target float64 `json:"target,omitempty"` // least ratio aimed at

	OurCosts   *costs `json:"ourCosts,omitempty"` // medians
	TheirCosts *costs `json:"theirCosts,omitempty"`
}

func (c *comparison) met() bool { return c.Ratio >= c.Target }

// What our figures are compared with beside contenders.
const (
	ownRaw   = "our raw"
	oneLayer = "our 1 layer"
	limit    = "the limit"
)

// lessIsBetter are the units of figures that should be small.
var lessIsBetter = []string{milliseconds, mebibytes}

// compare fills in the comparisons, in the order in which works are listed.
func (r *results) compare() {
	r.Comparisons = nil
	for _, w := range works() {
		for _, ourFigures := range r.ofOurs(w.name) {
			format := ourFigures.Format
			r.beside(ourFigures, qemuNBD, r.find(w.name, format, qemuNBD), w.target.besideQemuNBD(format))
			r.beside(ourFigures, nbdkit, r.find(w.name, format, nbdkit), w.target.nbdkit)
			r.beside(ourFigures, ownRaw, r.find(w.name, format, ownRaw), w.target.ownRaw)
			r.beside(ourFigures, oneLayer, r.find(w.name, format, oneLayer), w.target.oneLayer)
		}
	}
	r.compareDevices()
	for _, c := range conversions() {
		for _, ourFigures := range r.ofOurs(c.name) {
			r.beside(ourFigures, qemuImg, r.find(c.name, ourFigures.Format, qemuImg), c.target)
		}
	}
	for _, l := range openingLimits() {
		for _, ourFigures := range r.ofOurs(l.work) {
			r.beside(ourFigures, limit, limitOf(l.most, ourFigures), 1)
			r.beside(ourFigures, qemuNBD, r.find(l.work, ourFigures.Format, qemuNBD), 0)
		}
	}
}

// compareDevices fills in the comparisons of block devices.
func (r *results) compareDevices() {
	for _, w := range deviceWorks() {
		for _, ourFigures := range r.ofOurs(w.name) {
			r.beside(ourFigures, qemuStorageDaemon, r.find(w.name, ourFigures.Format, qemuStorageDaemon), 0)
			r.beside(ourFigures, plainLoop, r.find(w.name, ourFigures.Format, plainLoop), 0)
		}
	}
	for _, ourFigures := range r.ofOurs(idleDevice) {
		r.beside(ourFigures, limit, limitOf(idleMiB, ourFigures), 1)
		r.beside(ourFigures, qemuStorageDaemon, r.find(idleDevice, ourFigures.Format, qemuStorageDaemon), 0)
	}
}

// limitOf is a limit as figures to compare ours with.
func limitOf(most float64, ourFigures *figures) *figures {
	return &figures{Values: slices.Repeat([]float64{most}, len(ourFigures.Values))}
}

// ofOurs returns our figures at a work, by format.
func (r *results) ofOurs(work string) []*figures {
	var list []*figures
	for _, f := range r.Figures {
		if f.Work == work && f.Server == ours {
			list = append(list, f)
		}
	}
	return list
}

// beside adds the comparison of our figures with others, if there are any.
func (r *results) beside(our *figures, against string, other *figures, target float64) {
	if other == nil {
		return
	}
	better := ratios(our.Values, other.Values)
	if slices.Contains(lessIsBetter, our.Unit) {
		better = ratios(other.Values, our.Values)
	}
	if len(better) == 0 {
		return
	}
	r.Comparisons = append(r.Comparisons, comparison{
		Work: our.Work, Format: our.Format, Against: against, Unit: our.Unit,
		Ours: median(our.Values), Theirs: median(other.Values),
		OurCosts: medianCosts(our.Costs), TheirCosts: medianCosts(other.Costs),
		Ratio: median(better), Low: slices.Min(better), High: slices.Max(better), Target: target,
	})
}

// ratios divides round by round; a round that one of them lacks does not count.
func ratios(a, b []float64) []float64 {
	var list []float64
	for i := range min(len(a), len(b)) {
		if b[i] > 0 {
			list = append(list, a[i]/b[i])
		}
	}
	return list
}
