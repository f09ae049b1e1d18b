// Package formats knows disk images as files: which formats exist, what an image says
// about itself, how a chain of them is opened, created, checked, grown, converted.
//
//   - [Format] is one on-disk specification; packages raw, vmdk, … implement it, and
//     [All] lists them.
//   - [Open] opens an image with everything it stands on and returns a [Image]: a
//     block.Device and what people ask about it.
//   - package engine does the I/O; package formattest is the suite every format passes.
//
// # Trust
//
// Images come from strangers. A parent or extent is opened only within the vfs.FS that
// the image lies in; links are checked by vfs.Resolve; loops and chains deeper than
// [MaxDepth] are refused. The format of a volume is what its record says: probing
// ([Probe]) is for images that people bring, never for what a guest has written.
package formats
