package wire_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/supervisor"
)

// killRounds is how many volumes live their lives while the driver is being killed.
const killRounds = 2

// TestKilledDriver kills the driver at random moments, again and again, and sometimes the
// supervisor or a volume's server, while volumes live their whole lives. A client repeats each call until it succeeds, as Kubernetes
// does; the data must be there and nothing may be left.
func TestKilledDriver(t *testing.T) {
	w := newWorld(t)
	r := testenv.Rand(t)
	rounds := killRounds
	if testing.Short() {
		rounds = 1
	}
	k := &killer{world: w, rand: rand.New(rand.NewPCG(r.Uint64(), r.Uint64())), stop: make(chan struct{}), ended: make(chan struct{})}
	go k.run()
	t.Cleanup(k.end) // before the world is taken down
	repeats := 0
	for round := range rounds {
		for _, fsType := range []string{"ext4", "xfs", "btrfs", "block"} {
			repeats += liveUnderFire(t, w, r, fmt.Sprintf("%s-%d", fsType, round), fsType)
		}
	}
	k.end()
	w.wantEmptyStore()
	t.Logf("%d volumes; killed: driver %d times, supervisor or server %d; %d calls repeated", rounds*4, k.kills, k.othersKilled, repeats)
	if k.kills < rounds {
		t.Errorf("only %d kills", k.kills)
	}
}

// killer kills the driver and starts it again, until it is stopped; then one runs.
type killer struct {
	*world
	rand  *rand.Rand
	stop  chan struct{}
	ended chan struct{}

	// What follows is for who has seen ended closed.
	kills        int // of the driver
	othersKilled int
	otherKilled  time.Time // the last of them
}

func (k *killer) run() {
	defer close(k.ended)
	for {
		if k.rand.IntN(8) > 0 {
			k.awaitListening() // else it may be killed while it starts
		}
		select {
		case <-k.stop:
			return
		case <-time.After(time.Duration(k.rand.Int64N(int64(250 * time.Millisecond)))):
		}
		if k.rand.IntN(3) == 0 && k.killOther() {
			continue
		}
		k.kills++
		k.kill()
		if err := k.start(); err != nil {
			k.t.Errorf("start the driver: %v", err)
			return
		}
	}
}

// awaitListening waits until the driver has started, which takes long on a busy machine,
// but not for one that has given up.
func (k *killer) awaitListening() {
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		conn, err := net.Dial("unix", k.path("csi.sock"))
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-k.stop:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// otherInterval is how long supervisor and servers are left alone after one of them was
// killed. If both die together, a device on FUSE is lost: nobody holds it any more.
const otherInterval = 2 * time.Second

// killOther kills the supervisor or a volume's server, if all have recovered from the
// last time, and reports whether it has.
func (k *killer) killOther() bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	list, err := supervisor.NewClient(supervisor.SocketPath(k.path("run/supervisor"))).List(ctx)
	if err != nil || time.Since(k.otherKilled) < otherInterval {
		return false
	}
	for _, at := range list {
		if at.Phase != supervisor.Serving {
			return false
		}
	}
	for pid, args := range k.processes() {
		if strings.Contains(args, " supervisor ") || strings.Contains(args, " server ") {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
			k.otherKilled = time.Now()
			k.othersKilled++
			return true
		}
	}
	return false
}

func (k *killer) end() {
	select {
	case <-k.stop:
	default:
		close(k.stop)
	}
	<-k.ended
}

// final are codes after which a client gives up, for it has made a mistake; in this test
// it has made none.
var final = []codes.Code{
	codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.OutOfRange, codes.DataLoss, codes.Unimplemented, codes.ResourceExhausted,
}

// liveUnderFire takes a volume through its life and returns how many calls had to be
// repeated.
func liveUnderFire(t *testing.T, w *world, r *rand.Rand, name, fsType string) (repeats int) {
	t.Helper()
	insist := func(what string, call func() error) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for {
			err := call()
			if err == nil {
				return
			}
			repeats++
			if slices.Contains(final, status.Code(err)) || time.Now().After(deadline) {
				t.Fatalf("%s %s: %v", what, name, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	data := randomBytes(r, 300_000)
	v, restored := w.volume(name, fsType), w.volume("r-"+name, fsType)
	insist("create", func() error { return v.create(320*mib, nil, nil) })
	v.upAs(insist)
	v.put(data)
	insist("snapshot", func() error { return v.snapshot("s-" + name) })
	size := int64(384 * mib)
	if fsType == "ext4" && !canGrowExt4(t) {
		size = 320 * mib
	}
	insist("expand", func() error { return v.expand(size) })
	insist("node expand", func() error { return v.nodeExpand(size) })
	v.check(data)
	v.downAs(insist)
	insist("restore", func() error { return restored.create(320*mib, fromSnapshot(v.id+"@s-"+name), nil) })
	restored.upAs(insist)
	restored.check(data)
	restored.downAs(insist)
	insist("delete snapshot", func() error { return v.removeSnapshot("s-" + name) })
	insist("delete", v.remove)
	insist("delete", restored.remove)
	return repeats
}

func (v *volume) upAs(insist func(string, func() error)) {
	insist("controller publish", v.controllerPublish)
	insist("stage", v.stage)
	insist("publish", v.publish)
}

func (v *volume) downAs(insist func(string, func() error)) {
	insist("unpublish", v.unpublish)
	insist("unstage", v.unstage)
	insist("controller unpublish", v.controllerUnpublish)
}

// put writes data: to a file, or to the device itself.
func (v *volume) put(data []byte) {
	v.t.Helper()
	if v.capability.GetBlock() != nil {
		writeDevice(v.t, v.target, data)
		return
	}
	v.write("file", data)
}

func (v *volume) check(data []byte) {
	v.t.Helper()
	if v.capability.GetBlock() != nil {
		wantDevice(v.t, v.target, data)
		return
	}
	v.want("file", data)
}
