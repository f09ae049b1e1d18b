//go:build cgo

package confine_test

func init() { withCgo = true }
