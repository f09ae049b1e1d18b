// Package formats knows disk images as files: which formats exist, what an image says
// about itself, how a chain of them is opened, created, converted, changed.
//
//	format.go    what a format must answer; packages raw, vmdk, … implement it
//	registry.go  which formats there are, their other names, and probing
//	image.go     an open image: a block.Device, and what people ask about it
//	chain.go     opening an image with all it stands on
//	copy.go      copying a disk's contents: in parallel, sparse, compressed, over a parent
//	convert.go   a new image with a disk's contents
//	newfiles.go  making a new image's files, and their space
//	staging.go   … that gets its name when it is complete
//	compare.go   in what two disks differ
//	rebase.go    another parent, or none, for an image that reads the same
//	commit.go    an overlay's contents into what it stands on
//	measure.go   how much space an image would take
//
// Package engine does the I/O; package formattest is the suite every format passes;
// package all registers the formats.
//
// # Trust
//
// Images come from strangers. A parent or extent is opened only within the vfs.FS that
// the image lies in; links are checked by vfs.Resolve; loops and chains deeper than
// [MaxDepth] are refused. The format of a volume is what its record says: probing
// ([Probe]) is for images that people bring, never for what a guest has written.
package formats
