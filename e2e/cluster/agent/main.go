// Command agent runs on each machine of a test cluster and runs commands that come over virtual
// serial ports: see package wire.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/cluster/wire"
)

func main() {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil || names == nil {
		fmt.Fprintln(os.Stderr, "agent: this machine has no virtual serial ports:", err)
		os.Exit(1)
	}
	var serving sync.WaitGroup
	b := newBell()
	for _, path := range names {
		name, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(name), wire.PortPrefix) {
			continue
		}
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(path)))
		serving.Go(func() {
			for {
				err := serve(device, b)
				fmt.Fprintf(os.Stderr, "agent: %s: %v\n", device, err)
				time.Sleep(time.Second)
			}
		})
	}
	serving.Wait()
}
