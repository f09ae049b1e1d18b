package main

import "slices"

// Contenders.
const (
	ours     = "csi-imgdisk"
	qemuNBD  = "qemu-nbd"
	nbdkit   = "nbdkit file"
	qemuImg  = "qemu-img"
	rawName  = "raw"
	vmdkName = "vmdk"
)

// Units of figures.
const (
	opsPerSecond = "ops/s"
	mibPerSecond = "MiB/s"
	milliseconds = "ms"
	mebibytes    = "MiB"
)

// Sections of a run: -only chooses them by name.
const (
	sectionNBD        = "nbd"
	sectionFirstWrite = "first-write"
	sectionLayers     = "layers"
	sectionDevice     = "device"
	sectionConvert    = "convert"
	sectionOpen       = "open"
)

func sections() []string {
	return []string{sectionNBD, sectionFirstWrite, sectionLayers, sectionDevice, sectionConvert, sectionOpen}
}

// work is one thing that servers are measured at, in every format.
type work struct {
	section    string
	name       string
	mode       string // fio's rw=
	blockBytes int64
	depth      int
	kind       imageKind
	formats    []string // nil: all
	layers     int      // of a chain
	target     targets
}

// imageKind is which image a work is done on.
type imageKind int

const (
	fullImage  imageKind = iota // every cluster has contents
	emptyImage                  // a new one: what is written is written for the first time
	chainImage                  // of several layers, each of which has contents of its own
)

// targets are least ratios of our figure to another's (DESIGN: "Speed"); 0 is none.
type targets struct {
	qemuNBD  float64
	nbdkit   float64            // on raw
	byFormat map[string]float64 // instead of qemuNBD
	ownRaw   float64            // our figure on raw
	oneLayer float64            // our figure with one layer
}

func (t targets) besideQemuNBD(format string) float64 {
	if t.byFormat != nil {
		return t.byFormat[format]
	}
	return t.qemuNBD
}

const (
	kib4           = 4 << 10
	mib1     int64 = 1 << 20
	seqDepth       = 4
)

// mainFormats are measured at everything, others only where formats differ the most: a whole
// run should take no longer than one waits for it.
var mainFormats = []string{rawName, vmdkName, "qcow2", "vdi", "vhdx"}

// chainFormats are those whose chains qemu-img makes and qemu-nbd reads.
var chainFormats = []string{"qcow2", vmdkName}

// loads are what servers and block devices do with a full image.
func loads() []work {
	return []work{
		{name: "4 KiB random read, depth 32", mode: "randread", blockBytes: kib4, depth: 32},
		{name: "4 KiB random overwrite, depth 32", mode: "randwrite", blockBytes: kib4, depth: 32},
		{name: "4 KiB random read, depth 1", mode: "randread", blockBytes: kib4, depth: 1},
		{name: "4 KiB random overwrite, depth 1", mode: "randwrite", blockBytes: kib4, depth: 1},
		{name: "1 MiB sequential read", mode: "read", blockBytes: mib1, depth: seqDepth},
		{name: "1 MiB sequential overwrite", mode: "write", blockBytes: mib1, depth: seqDepth},
	}
}

// deviceWorks returns everything that is measured on block devices.
func deviceWorks() []work {
	list := loads()
	for i := range list {
		list[i].section, list[i].name = sectionDevice, "block device: "+list[i].name
	}
	return list
}

// Memory of what is served and not used.
const idleDevice = "block device, idle: resident memory"

// idleMiB is what an attached volume that nobody uses may take.
const idleMiB = 15

// works returns everything that is measured through NBD.
func works() []work {
	deep := targets{qemuNBD: 2, nbdkit: 0.95}
	alone := targets{qemuNBD: 1.3, nbdkit: 0.95}
	stream := targets{qemuNBD: 1.5, nbdkit: 0.95}
	list := loads()
	for i, target := range []targets{deep, deep, alone, {}, stream, stream} {
		list[i].section, list[i].target = sectionNBD, target
		if list[i].depth < 32 {
			list[i].formats = mainFormats
		}
	}
	list = append(list,
		work{section: sectionFirstWrite, name: "4 KiB random first write, depth 32", mode: "randwrite", blockBytes: kib4, depth: 32,
			kind: emptyImage, target: targets{byFormat: map[string]float64{vmdkName: 10}, ownRaw: 0.8}},
		work{section: sectionFirstWrite, name: "1 MiB sequential first write", mode: "write", blockBytes: mib1, depth: seqDepth,
			kind: emptyImage, formats: mainFormats},
	)
	for _, layers := range []int{1, 8, 32} {
		w := work{
			section: sectionLayers, name: chainName(layers), mode: "randread", blockBytes: kib4, depth: 32,
			kind: chainImage, formats: chainFormats, layers: layers,
		}
		if layers == deepest {
			w.target.oneLayer = 0.9
		}
		list = append(list, w)
	}
	return list
}

// deepest is the number of layers that is compared with one.
const deepest = 32

func chainName(layers int) string {
	if layers == 1 {
		return "4 KiB random read through 1 layer"
	}
	return "4 KiB random read through " + number(float64(layers)) + " layers"
}

func (w *work) unit() string {
	if w.blockBytes >= mib1 {
		return mibPerSecond
	}
	return opsPerSecond
}

// isFor says whether the work is done in a format.
func (w *work) isFor(format string) bool {
	return w.formats == nil || slices.Contains(w.formats, format)
}

// contenders are who does a work in a format: beside others, we ourselves on the image that
// our figure is compared with, so that both are of the same moment.
func (w *work) contenders(format string) []string {
	list := []string{ours, qemuNBD}
	switch {
	case format == rawName:
		return append(list, nbdkit)
	case w.target.ownRaw > 0:
		return append(list, ownRaw)
	case w.target.oneLayer > 0:
		return append(list, oneLayer)
	}
	return list
}
