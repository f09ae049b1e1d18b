package main

import (
	"bytes"
	_ "embed"
	"fmt"
	"math"
	"text/template"
)

//go:embed plot.svg.tmpl
var plotText string

var plotTemplate = template.Must(template.New("plot").Parse(plotText))

// Geometry of the plot, in pixels.
const (
	plotWidth  = 900
	barsLeft   = 190
	barsWidth  = 470
	topHeight  = 96
	workHeight = 34
	rowHeight  = 20
	barHeight  = 13
)

// plot is what the template draws: a heading per work, a bar per comparison, on a
// logarithmic scale from 1, our figure being equal to the other.
type plot struct {
	Width, Height       int
	Title, Subtitle     string
	Works               []label
	Bars                []bar
	Ticks               []label
	One                 int // x of the ratio 1
	Top, Bottom         int
	BarHeight, BarsLeft int
}

type label struct {
	X, Y int
	Text string
}

type bar struct {
	Y, X, Width      int
	TextY            int
	Name, Figures    string
	Class            string // "met", "missed", or "plain" without a target
	Target           int    // x of the target; 0: none
	TargetY          int
	TargetEnd        int
	RangeY           int
	RangeX, RangeEnd int // least and greatest ratio
}

// plot draws the comparisons as SVG.
func (r *results) plot() ([]byte, error) {
	var out bytes.Buffer
	if err := plotTemplate.Execute(&out, r.layOut()); err != nil {
		return nil, fmt.Errorf("plot: %w", err)
	}
	return out.Bytes(), nil
}

func (r *results) layOut() plot {
	scale := newScale(r.Comparisons)
	p := plot{
		Width: plotWidth, Top: topHeight, BarHeight: barHeight, BarsLeft: barsLeft, One: scale.x(1),
		Title: "csi-imgdisk beside qemu-nbd, nbdkit and qemu-img",
		Subtitle: escape(fmt.Sprintf("%s, %d CPUs, Linux %s, %s, %.10s; medians of %d rounds of %v s",
			r.Machine.Model, r.Machine.CPUs, r.Machine.Kernel, r.Machine.fileSystems(), r.Date, r.Rounds, r.Seconds)),
	}
	y, work := topHeight, ""
	for _, c := range r.Comparisons {
		if c.Work != work {
			work = c.Work
			y += workHeight
			p.Works = append(p.Works, label{Y: y - 8, Text: escape(c.Work)})
		}
		p.Bars = append(p.Bars, scale.bar(c, y))
		y += rowHeight
	}
	p.Bottom = y + 4
	p.Height = p.Bottom + 12
	for _, tick := range scale.ticks() {
		p.Ticks = append(p.Ticks, label{X: scale.x(tick), Y: topHeight - 6, Text: number(tick) + "×"})
	}
	return p
}

// scale maps ratios to places: powers of two at equal distances.
type scale struct{ low, high float64 } // logarithms to base 2

// newScale holds all ratios and targets, and what lies between a half and four anyway.
func newScale(list []comparison) scale {
	s := scale{low: -1, high: 2}
	for _, c := range list {
		for _, ratio := range []float64{c.Ratio, c.Target} {
			if ratio > 0 && !math.IsInf(ratio, 0) {
				s.low = min(s.low, math.Floor(math.Log2(ratio)))
				s.high = max(s.high, math.Ceil(math.Log2(ratio)))
			}
		}
	}
	return s
}

// x is where a ratio is, within the scale.
func (s scale) x(ratio float64) int {
	at := s.low
	if ratio > 0 {
		at = min(max(math.Log2(ratio), s.low), s.high)
	}
	return barsLeft + int(math.Round((at-s.low)/(s.high-s.low)*barsWidth))
}

func (s scale) ticks() []float64 {
	var list []float64
	for at := s.low; at <= s.high; at++ {
		list = append(list, math.Exp2(at))
	}
	return list
}

func (s scale) bar(c comparison, y int) bar {
	from, to := s.x(1), s.x(c.Ratio)
	b := bar{
		Y: y + (rowHeight-barHeight)/2, TextY: y + rowHeight - 6,
		X: min(from, to), Width: max(from, to) - min(from, to),
		Name: escape(c.Format + " : " + c.Against), Class: "plain",
		Figures: escape(fmt.Sprintf("%.2f× (%s : %s %s)", c.Ratio, number(c.Ours), number(c.Theirs), c.Unit)),
		RangeX:  s.x(c.Low), RangeEnd: s.x(c.High), RangeY: y + rowHeight/2,
	}
	if c.Target > 0 {
		b.Target, b.TargetY, b.TargetEnd = s.x(c.Target), y+1, y+rowHeight-1
		b.Class = c.verdict()
	}
	return b
}

// escape makes text fit for XML.
func escape(text string) string { return template.HTMLEscapeString(text) }
