// Package suite runs Kubernetes' own storage suite against the driver in a test cluster, and
// says by name what passed, failed and was skipped.
//
// driver.yaml claims every capability that the driver has. A test that is skipped although
// it is one of a claimed capability is a failure: see capabilities, which is also what a short run
// consists of.
package suite
