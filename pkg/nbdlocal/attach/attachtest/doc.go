// Package attachtest is the suite that every attach.Transport passes, on real kernels:
// it attaches devices, loads them, kills their servers and whoever attached them, and
// looks for what was lost or left behind. It needs root.
//
// A test binary that uses it calls Main from TestMain: servers and supervisors are
// processes of their own, started from the same binary, so that they can be killed.
//
//   - process.go: those processes
//   - device.go: the block.Device they serve, a plain file
//   - load.go: verifying load
//   - rig.go: one attached device, and what to do to it
//   - suite.go: the tests
package attachtest
