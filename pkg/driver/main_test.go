package driver

import (
	"flag"
	"os"
	"testing"

	"k8s.io/klog/v2"
)

// TestMain keeps refused calls, which the tests make many of, out of the output.
func TestMain(m *testing.M) {
	flag.Parse()
	if !testing.Verbose() {
		klog.LogToStderr(false)
		klog.SetOutput(discard{})
	}
	os.Exit(m.Run())
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }
