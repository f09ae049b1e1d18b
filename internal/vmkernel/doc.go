// Package vmkernel gets kernels of Debian's and what boots them in virtual machines, for tests.
//
//   - kernel.go: finds, downloads and unpacks kernels, into a cache
//   - modules.go: reads a kernel's modules and what they depend on
//   - initramfs.go: packs what a machine needs to find its disk
package vmkernel
