// Package volumes holds the tests that run inside a virtual machine of test/vm with whole
// volumes: the real program's driver, supervisor and servers, on kernels of Debian's.
package volumes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/load"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

const (
	mib     = 1 << 20
	program = "/bin/csi-imgdisk"
)

// on skips a test elsewhere than on its machine: it would take over another one.
func on(t *testing.T, machine string) {
	t.Helper()
	if os.Getenv("IMGDISK_VM_GUEST") != machine {
		t.Skipf("runs in the virtual machine %q: make vm-test", machine)
	}
}

// startNode starts a node with a store in a directory, which it makes. Closing it at the
// test's end must find that nothing is left.
func startNode(t *testing.T, store string) *node.Node {
	t.Helper()
	if err := os.MkdirAll(store, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/dev/shm", "node-")
	if err != nil {
		t.Fatal(err)
	}
	n, err := node.Start(t.Context(), node.Config{Binary: program, Store: store, Dir: dir, Name: filepath.Base(dir)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(context.Background()); err != nil {
			t.Errorf("close the node: %v", err)
		}
		if t.Failed() {
			t.Log(n.Log())
		}
		os.RemoveAll(dir)
	})
	return n
}

// storeDir names a store's directory on the machine's disk, for one test.
func storeDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join("/store", strings.ReplaceAll(t.Name(), "/", "-"))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// transports returns those that work here. The newer kernel must have all that we expect
// of it: a test that runs on none proves nothing.
func transports(t *testing.T, n *node.Node) []string {
	t.Helper()
	status, err := n.Supervisor().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, transport := range status.Transports {
		if transport.Problem == "" {
			names = append(names, transport.Name)
		} else {
			t.Logf("%s: %s", transport.Name, transport.Problem)
		}
	}
	for _, name := range wantTransports(t) {
		if !slices.Contains(names, name) {
			t.Errorf("transport %s does not work here", name)
		}
	}
	return names
}

func wantTransports(t *testing.T) []string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(unix.ByteSliceToString(u.Release[:]), "6.1.") {
		return []string{"nbd"}
	}
	return []string{"nbd", "ublk", "fuse"}
}

// loaded is a volume under load.
type loaded struct {
	t      *testing.T
	volume *node.Volume
	model  *load.Model
	run    *load.Run
}

// loadVolume makes and attaches a volume and loads it.
func loadVolume(t *testing.T, n *node.Node, name string, parameters map[string]string, opts load.Options) *loaded {
	t.Helper()
	v, err := n.Create(t.Context(), name, 24*mib, parameters)
	must(t, err)
	rng := testenv.Rand(t)
	opts.ID = rng.Uint32()
	l := &loaded{t: t, volume: v, model: load.New(v.SizeBytes, rng, opts)}
	must(t, v.Attach(t.Context()))
	l.start()
	t.Cleanup(func() {
		if l.run != nil {
			_ = l.run.Stop() // the test has failed already
		}
	})
	return l
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (l *loaded) start() {
	l.t.Helper()
	var err error
	l.run, err = l.model.Start(l.volume.Path())
	must(l.t, err)
}

func (l *loaded) stop() {
	l.t.Helper()
	run := l.run
	l.run = nil
	must(l.t, run.Stop())
}

// await waits until n more requests were answered, and fails with what the load found.
func (l *loaded) await(n int64) {
	l.t.Helper()
	if err := l.run.AwaitRequests(n, node.Patience); err != nil {
		run := l.run
		l.run = nil
		l.t.Fatalf("%v: %v", err, run.Stop())
	}
}

// end compares the whole volume, before and after a detach, and deletes it.
func (l *loaded) end() {
	l.t.Helper()
	l.stop()
	must(l.t, l.model.Verify(l.volume.Path()))
	must(l.t, l.volume.Detach(l.t.Context()))
	must(l.t, l.volume.Attach(l.t.Context()))
	must(l.t, l.model.Verify(l.volume.Path()))
	must(l.t, l.volume.Detach(l.t.Context()))
	must(l.t, l.volume.Delete(l.t.Context()))
	c := l.model.Counts()
	l.t.Logf("%s: %d requests, %d MiB written, %d MiB compared; the longest took %v", l.volume.ID,
		c.Requests, c.WrittenBytes/mib, c.ReadBytes/mib, c.Longest.Round(time.Millisecond))
}

// working are the transports that work on this machine, once perTransport has looked.
var working []string

// perTransport runs a test for each transport, on a node of its own.
func perTransport(t *testing.T, test func(t *testing.T, n *node.Node, parameters map[string]string)) {
	t.Helper()
	if working == nil {
		t.Run("probe", func(t *testing.T) { working = transports(t, startNode(t, storeDir(t))) })
	}
	for _, transport := range working {
		t.Run(transport, func(t *testing.T) {
			test(t, startNode(t, storeDir(t)), map[string]string{"transport": transport})
		})
	}
}

func fail(t *testing.T, what string, list []string) {
	t.Helper()
	if len(list) > 0 {
		t.Errorf("%s:\n%s", what, fmt.Sprint(strings.Join(list, "\n")))
	}
}
