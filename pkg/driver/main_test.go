package driver

import (
	"flag"
	"io"
	"os"
	"testing"

	"k8s.io/klog/v2"
)

// TestMain keeps refused calls, which the tests make many of, out of the output.
func TestMain(m *testing.M) {
	flag.Parse()
	if !testing.Verbose() {
		klog.LogToStderr(false)
		klog.SetOutput(io.Discard)
		flags := flag.NewFlagSet("klog", flag.PanicOnError)
		klog.InitFlags(flags)
		if err := flags.Set("stderrthreshold", "FATAL"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}
