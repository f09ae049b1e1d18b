// Package raw is the format without a format: guest byte n is byte n of the file.
//
//	format.go  opening
//	create.go  creating
//	codec.go   what the engine asks
//
// # What is supported
//
// Everything: reading, writing, holes (zeroing and discard punch them), another size. A raw
// image can stand below overlays of other formats; it cannot stand on a parent itself.
// A file of any length opens with its true length; what is created is a multiple of 512
// bytes, because no guest can address less.
//
// Nothing in a raw file says that it is one, so raw is probed last and takes what no
// other format wants. Its guest can write any format's header into it: a volume's format
// is always given, never probed.
//
// # Why crashes are harmless
//
// There are no tables, so nothing can contradict anything. A crash while an image is
// created or resized can leave a file of another length, as far as the file system allows
// that: whoever creates an image records its name after Create has returned, and whoever
// grows one grows it again.
package raw
