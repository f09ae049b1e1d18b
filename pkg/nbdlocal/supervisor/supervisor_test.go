package supervisor

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

func TestAttachResizeDetach(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	if at.SizeBytes != imageBytes || at.Transport != "fake" || at.ID != image {
		t.Errorf("attached: %+v", at)
	}
	again := h.attach(image)
	if diff := cmp.Diff(at, again); diff != "" {
		t.Errorf("attached again (-first +second):\n%s", diff)
	}
	if err := os.Truncate(image, 2*imageBytes+100); err != nil {
		t.Fatal(err)
	}
	at, err := h.client.Resize(h.ctx, image)
	if err != nil || at.SizeBytes != 2*imageBytes || h.kernel.device(image).SizeBytes != 2*imageBytes {
		t.Errorf("resized: %+v, %v; device %+v", at, err, h.kernel.device(image))
	}
	list, err := h.client.List(h.ctx)
	if err != nil || len(list) != 1 || !cmp.Equal(list[0], at) {
		t.Errorf("list: %+v, %v", list, err)
	}
	stats, err := h.client.Stats(h.ctx, image)
	if err != nil || stats.Serving["fake"] != 1 || string(stats.Device) != `{"opens":1}` {
		t.Errorf("stats: %+v, %v", stats, err)
	}
	h.detach(image)
	for name, err := range map[string]error{
		"get":    second(h.client.Get(h.ctx, image)),
		"resize": second(h.client.Resize(h.ctx, image)),
		"stats":  second(h.client.Stats(h.ctx, image)),
		"detach": h.client.Detach(h.ctx, image, false),
		"force":  h.client.Detach(h.ctx, image, true),
	} {
		if !errors.Is(err, block.ErrNotFound) {
			t.Errorf("%s after detach: %v, want %v", name, err, block.ErrNotFound)
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestAttach_Refused(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(filepath.Join(h.dir, "tiny"), "less than a sector")
	corrupt := h.newImage("corrupt")
	h.write(corrupt+".fail-open", "corrupt")
	for name, c := range map[string]struct {
		change func(*AttachRequest)
		want   error
		says   string
	}{
		"other arguments":   {func(r *AttachRequest) { r.Server = append(r.Server, "more") }, block.ErrExists, "other arguments"},
		"read-only":         {func(r *AttachRequest) { r.ReadOnly = true }, block.ErrExists, "other arguments"},
		"unknown transport": {func(r *AttachRequest) { r.ID, r.Transport = "x", "pigeon" }, block.ErrInvalid, `"pigeon"`},
		"no id":             {func(r *AttachRequest) { r.ID = "" }, block.ErrInvalid, "1 to 1024 bytes"},
		"id of two dots":    {func(r *AttachRequest) { r.ID = ".." }, block.ErrInvalid, `".."`},
		"no server":         {func(r *AttachRequest) { r.ID, r.Server = "x", nil }, block.ErrInvalid, "arguments"},
		"too small":         {func(r *AttachRequest) { *r = request(filepath.Join(h.dir, "tiny")) }, block.ErrInvalid, "at least one block"},
		"no image":          {func(r *AttachRequest) { *r = request(filepath.Join(h.dir, "none")) }, block.ErrNotFound, "none"},
		"corrupt image":     {func(r *AttachRequest) { *r = request(corrupt) }, block.ErrCorrupt, "told to fail"},
		"no such program":   {func(r *AttachRequest) { r.ID, r.Server = "x", []string{"-test.list=("} }, nil, "exit status"},
	} {
		r := request(image)
		c.change(&r)
		_, err := h.client.Attach(h.ctx, r)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.says)
		}
		if r.ID != image && r.ID != "" && r.ID != ".." {
			h.checkGone(r.ID)
		}
	}
	if list, err := h.client.List(h.ctx); err != nil || len(list) != 1 {
		t.Errorf("left after refused attaches: %+v, %v", list, err)
	}
}

func TestAttach_NoTransportWorks(t *testing.T) {
	h := newHarness(t)
	if err := os.RemoveAll(h.kernel.dir); err != nil {
		t.Fatal(err)
	}
	h.startHere()
	_, err := h.client.Attach(h.ctx, request(h.newImage("disk")))
	if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "make that directory") {
		t.Errorf("attach: %v", err)
	}
	status, err := h.client.Status(h.ctx)
	if err != nil || len(status.Transports) != 1 || status.Transports[0].Problem == "" || status.Version != "test" {
		t.Errorf("status: %+v, %v", status, err)
	}
}

func TestAttach_ReadOnlyDevice(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	r := request(image)
	r.ReadOnly = true
	if at, err := h.client.Attach(h.ctx, r); err != nil || !at.ReadOnly || !h.kernel.device(image).ReadOnly {
		t.Errorf("attached: %+v, %v; device %+v", at, err, h.kernel.device(image))
	}
}

func TestAttach_ConcurrentDuplicatesAreOne(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	const clients = 8
	var all sync.WaitGroup
	got := make([]Attachment, clients)
	for i := range clients {
		all.Go(func() {
			var err error
			if got[i], err = h.client.Attach(h.ctx, request(image)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for i := range got {
		if !cmp.Equal(got[i], got[0]) {
			t.Errorf("client %d got %+v, client 0 %+v", i, got[i], got[0])
		}
	}
	for range clients {
		all.Go(func() {
			if err := h.client.Detach(h.ctx, image, false); err != nil && !errors.Is(err, block.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	h.checkGone(image)
	if events := h.events(image); !slices.Equal(events, []string{"open", "close"}) {
		t.Errorf("image: %v", events)
	}
}

// Whatever many clients do at once, each answer is one they could get alone, and in
// the end nothing is left.
func TestConcurrentClients(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	images := []string{h.newImage("a"), h.newImage("b"), h.newImage("c")}
	var all sync.WaitGroup
	for i := range 6 {
		all.Go(func() {
			for round := range 6 {
				image := images[(i+round)%len(images)]
				var err error
				switch (i + 2*round) % 5 {
				case 0, 1, 2:
					_, err = h.client.Attach(h.ctx, request(image))
				case 3:
					err = h.client.Detach(h.ctx, image, round%2 == 0)
				case 4:
					_, err = h.client.Resize(h.ctx, image)
				}
				switch {
				case err == nil, errors.Is(err, block.ErrNotFound), errors.Is(err, block.ErrBusy), errors.Is(err, block.ErrClosed):
				default:
					t.Errorf("client %d round %d: %v", i, round, err)
				}
			}
		})
	}
	all.Wait()
	for _, image := range images {
		if err := h.client.Detach(h.ctx, image, false); err != nil && !errors.Is(err, block.ErrNotFound) {
			t.Error(err)
		}
		h.checkGone(image)
		for _, o := range h.openings(image) { // no server was killed by anybody else
			h.checkClosed(image, o)
		}
	}
}

func TestAttach_ClientGoneMeanwhile(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.write(image+".slow-open", "")
	ctx, cancel := context.WithTimeout(h.ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := h.client.Attach(ctx, request(image)); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("attach: %v", err)
	}
	h.remove(image + ".slow-open")
	h.attach(image)
	if events := h.events(image); !slices.Equal(events, []string{"open"}) {
		t.Errorf("image: %v, want one opening", events)
	}
}

func TestServerKilled(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	birth := h.kernel.device(image).Birth
	for i := range 3 {
		killServer(t, at.PID)
		at = h.waitRestart(image, at.PID)
		if at.Restarts != i+1 || at.Problem != "" {
			t.Errorf("after kill %d: %+v", i+1, at)
		}
	}
	if h.kernel.device(image).Birth != birth {
		t.Error("the device is another one")
	}
	h.detach(image)
}

// A server that cannot open its image again is tried until it can, and meanwhile
// says why not; an attach waits for it.
func TestServerKilled_CannotReopen(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	h.write(image+".fail-open", "corrupt")
	killServer(t, at.PID)
	h.eventually("the reason", func() error {
		at, err := h.client.Get(h.ctx, image)
		if err == nil && (at.Phase != Recovering || !strings.Contains(at.Problem, "told to fail") || at.Restarts < 2) {
			err = errors.New(at.Problem)
		}
		return err
	})
	if err := h.client.Detach(h.ctx, image, false); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("detach of what cannot be flushed: %v, want %v", err, block.ErrCorrupt)
	}
	if _, err := h.client.Resize(h.ctx, image); !errors.Is(err, block.ErrBusy) {
		t.Errorf("resize: %v, want %v", err, block.ErrBusy)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- second(h.client.Attach(h.ctx, request(image))) }()
	select {
	case err := <-waiting:
		t.Errorf("attach did not wait: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	h.remove(image + ".fail-open")
	if err := <-waiting; err != nil {
		t.Errorf("attach that waited: %v", err)
	}
	h.detach(image)
}

func TestServerKilled_SuccessorUnfit(t *testing.T) {
	for name, spoil := range map[string]func(h *harness, image string) (undo func()){
		"smaller": func(h *harness, image string) func() {
			if err := os.Truncate(image, 4096); err != nil {
				h.t.Fatal(err)
			}
			return func() { _ = os.Truncate(image, imageBytes) }
		},
		"read-only": func(h *harness, image string) func() {
			h.write(image+".read-only", "")
			return func() { h.remove(image + ".read-only") }
		},
		"recover fails": func(h *harness, image string) func() {
			h.write(h.kernel.path(image, ".fail-recover"), "")
			return func() { h.remove(h.kernel.path(image, ".fail-recover")) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.startHere()
			image := h.newImage("disk")
			at := h.attach(image)
			undo := spoil(h, image)
			killServer(t, at.PID)
			h.eventually("two tries", func() error {
				at, err := h.client.Get(h.ctx, image)
				if err == nil && (at.Phase != Recovering || at.Restarts < 2) {
					err = errors.New(string(at.Phase))
				}
				return err
			})
			undo()
			h.waitPhase(image, Serving)
			h.detach(image)
		})
	}
}

// When the kernel gives up a connection to a living server, the device is recovered.
func TestConnectionEnded(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	f, err := os.OpenFile(h.kernel.path(image, ".fifo"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	h.waitRestart(image, at.PID)
	h.detach(image)
}

func TestDetach_Busy(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	h.write(h.kernel.path(image, ".busy"), "")
	if err := h.client.Detach(h.ctx, image, false); !errors.Is(err, block.ErrBusy) {
		t.Fatalf("detach: %v, want %v", err, block.ErrBusy)
	}
	if now := h.waitPhase(image, Serving); now.PID != at.PID || now.Problem != "" {
		t.Errorf("after a refused detach: %+v", now)
	}
	h.remove(h.kernel.path(image, ".busy"))
	h.detach(image)
}

func TestDetach_BusyByForce(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(h.kernel.path(image, ".busy"), "")
	if err := h.client.Detach(h.ctx, image, true); err != nil {
		t.Fatal(err)
	}
	h.checkGone(image)
}

// A server that dies while its device is being flushed for a detach is replaced, and
// the detach goes on.
func TestDetach_ServerKilledMeanwhile(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	h.write(h.kernel.path(image, ".slow-detach"), "")
	detached := make(chan error, 1)
	go func() { detached <- h.client.Detach(h.ctx, image, false) }()
	h.waitPhase(image, Detaching)
	killServer(t, at.PID)
	h.eventually("another server", func() error {
		if now, err := h.client.Get(h.ctx, image); err != nil || now.PID == 0 || now.PID == at.PID {
			return errors.New("not yet")
		}
		return nil
	})
	h.remove(h.kernel.path(image, ".slow-detach"))
	if err := <-detached; err != nil {
		t.Error(err)
	}
	h.checkGone(image)
}

func TestDetach_StuckThenForced(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(h.kernel.path(image, ".slow-detach"), "")
	stuck := make(chan error, 1)
	go func() { stuck <- h.client.Detach(h.ctx, image, false) }()
	h.waitPhase(image, Detaching)
	if err := h.client.Detach(h.ctx, image, true); err != nil {
		t.Error(err)
	}
	if err := <-stuck; !errors.Is(err, block.ErrBusy) {
		t.Errorf("the detach that was stuck: %v, want %v", err, block.ErrBusy)
	}
	h.checkGone(image)
}

func TestAttach_StuckThenForced(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.write(image+".slow-open", "")
	stuck := make(chan error, 1)
	go func() { stuck <- second(h.client.Attach(h.ctx, request(image))) }()
	h.waitPhase(image, Attaching)
	if err := h.client.Detach(h.ctx, image, true); err != nil {
		t.Error(err)
	}
	if err := <-stuck; !errors.Is(err, block.ErrBusy) {
		t.Errorf("the attach that was stuck: %v, want %v", err, block.ErrBusy)
	}
	h.checkGone(image)
}

// When the image cannot be closed the detach says so, and a second one tries again.
func TestDetach_CloseFails(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(image+".fail-close", "")
	for range 2 {
		err := h.client.Detach(h.ctx, image, false)
		if !errors.Is(err, block.ErrNoSpace) || !strings.Contains(err.Error(), "closing the image") {
			t.Fatalf("detach: %v, want %v", err, block.ErrNoSpace)
		}
		at := h.waitPhase(image, Detaching)
		if !strings.Contains(at.Problem, "closing the image") || at.PID != 0 {
			t.Errorf("after a failed close: %+v", at)
		}
	}
	h.remove(image + ".fail-close")
	h.detach(image)
	if events := h.events(image); !slices.Equal(events, []string{"open", "close-failed", "open", "close-failed", "open", "close"}) {
		t.Errorf("image: %v", events)
	}
}

func TestDetach_CloseFailsThenAttach(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(image+".fail-close", "")
	if err := h.client.Detach(h.ctx, image, false); !errors.Is(err, block.ErrNoSpace) {
		t.Fatalf("detach: %v, want %v", err, block.ErrNoSpace)
	}
	h.remove(image + ".fail-close")
	h.attach(image)
	h.detach(image)
}

// A fenced volume's device is taken away at once, and its image not opened again.
func TestFenced(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(image+".lost", "")
	at := h.waitPhase(image, Lost)
	if !strings.Contains(at.Problem, block.ErrFenced.Error()) || at.Device != "" {
		t.Errorf("lost: %+v", at)
	}
	if h.kernel.device(image).ID != "" {
		t.Error("the device is left")
	}
	h.remove(image + ".lost")
	h.detach(image)
	if events := h.events(image); !slices.Equal(events, []string{"open", "close"}) {
		t.Errorf("image: %v", events)
	}
}

// A volume fenced while its server was dead is lost when the next one tries to open.
func TestFenced_WhileDead(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	h.write(image+".fail-open", "fenced")
	killServer(t, at.PID)
	h.waitPhase(image, Lost)
	if _, err := h.client.Attach(h.ctx, request(image)); !errors.Is(err, block.ErrFenced) {
		t.Errorf("attach on a node that is fenced: %v", err)
	}
	h.remove(image + ".fail-open")
	h.attach(image) // the volume came back
	h.detach(image)
}

func TestKernelLosesDevice(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	if err := h.kernel.Abort(h.ctx, attach.State{Spec: attach.Spec{ID: image}}); err != nil {
		t.Fatal(err)
	}
	killServer(t, at.PID)
	h.waitPhase(image, Lost)
	h.detach(image)
	if events := h.events(image); events[len(events)-1] != "close" {
		t.Errorf("image: %v, want it closed", events)
	}
	h.attach(image)
	h.detach(image)
}

func TestStop(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	if err := h.client.Stop(h.ctx); !errors.Is(err, block.ErrBusy) {
		t.Fatalf("stop with a volume attached: %v, want %v", err, block.ErrBusy)
	}
	h.detach(image)
	if err := h.client.Stop(h.ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.ended:
	case <-time.After(patience):
		t.Fatal("the supervisor does not end")
	}
	if _, err := h.client.List(h.ctx); !errors.Is(err, ErrNotRunning) {
		t.Errorf("list after stop: %v, want %v", err, ErrNotRunning)
	}
}

func TestRun_OnePerStateDirectory(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	s, err := New(testConfig(h.values(), io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(h.ctx); !errors.Is(err, block.ErrLocked) {
		t.Errorf("second supervisor: %v, want %v", err, block.ErrLocked)
	}
	if _, err := h.client.List(h.ctx); err != nil {
		t.Errorf("the first one: %v", err)
	}
}

func TestSocketMode(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	for path, want := range map[string]os.FileMode{SocketPath(h.stateDir): 0o600, h.stateDir: 0o700} {
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %v", path, fi, err, want)
		}
	}
}

// A supervisor told to end leaves servers and devices alone; the next one takes over.
func TestSuccession(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	birth := h.kernel.device(image).Birth
	h.end()
	h.startHere()
	if now := h.attach(image); now.PID != at.PID {
		t.Errorf("adopted: %+v, want pid %d", now, at.PID)
	}
	killServer(t, at.PID) // not a child of this supervisor
	at = h.waitRestart(image, at.PID)
	h.end()
	killServer(t, at.PID)
	h.startHere()
	h.waitRestart(image, at.PID)
	if h.kernel.device(image).Birth != birth {
		t.Error("the device is another one")
	}
	h.detach(image)
}

func TestSuccession_DeviceGone(t *testing.T) {
	for _, serverToo := range []bool{false, true} {
		h := newHarness(t)
		h.startHere()
		image := h.newImage("disk")
		at := h.attach(image)
		h.end()
		if err := h.kernel.Abort(h.ctx, attach.State{Spec: attach.Spec{ID: image}}); err != nil {
			t.Fatal(err)
		}
		if serverToo {
			killServer(t, at.PID)
		}
		h.startHere()
		if at := h.waitPhase(image, Lost); !strings.Contains(at.Problem, "kernel lost the device") {
			t.Errorf("lost: %+v", at)
		}
		h.attach(image)
		h.detach(image)
	}
}

func TestSuccession_AfterReboot(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	h.end()
	killServer(t, at.PID)
	dir := filepath.Join(h.stateDir, "attachments", dirName(image))
	h.eventually("the server's end", func() error {
		lock, err := lockServer(dir, 0)
		if err == nil {
			lock.Close()
		}
		return err
	})
	rec, err := loadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	rec.BootID = "another"
	if err := rec.save(dir); err != nil {
		t.Fatal(err)
	}
	if err := h.kernel.Abort(h.ctx, attach.State{Spec: attach.Spec{ID: image}}); err != nil {
		t.Fatal(err)
	}
	h.startHere()
	if list, err := h.client.List(h.ctx); err != nil || len(list) != 0 {
		t.Errorf("after a reboot: %+v, %v", list, err)
	}
	h.attach(image)
	h.detach(image)
}

// A record that cannot be read keeps a supervisor from starting: what it is about may
// be in use.
func TestSuccession_UnreadableRecord(t *testing.T) {
	h := newHarness(t)
	for content, want := range map[string]error{
		`{"version":3}`:          block.ErrUnsupported,
		`{"version":2,"seat":2}`: block.ErrCorrupt,
		`{"version":1`:           block.ErrCorrupt,
		`{"version":1,"request":{"id":"other"},"phase":"serving"}`: block.ErrCorrupt,
	} {
		dir := filepath.Join(h.stateDir, "attachments", dirName("x"))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		h.write(filepath.Join(dir, recordFile), content)
		s, err := New(testConfig(h.values(), io.Discard))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Run(h.ctx); !errors.Is(err, want) {
			t.Errorf("record %s: %v, want %v", content, err, want)
		}
	}
}

// A drained node signals every process: a server in use does not obey.
func TestServer_IgnoresSigtermWhileServing(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	if err := syscall.Kill(at.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.stateDir, "attachments", dirName(image))
	h.eventually("the log line", func() error {
		log, err := os.ReadFile(filepath.Join(dir, logFile))
		if err == nil && !strings.Contains(string(log), "signal ignored") {
			err = errors.New(string(log))
		}
		return err
	})
	if now, err := h.client.Get(h.ctx, image); err != nil || now.PID != at.PID || now.Phase != Serving {
		t.Errorf("after SIGTERM: %+v, %v", now, err)
	}
	h.detach(image)
}
