package supervisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// upgrade upgrades an attachment and checks that it is served by the program, on the same
// device.
func (h *harness) upgrade(image, program string) Attachment {
	h.t.Helper()
	before, err := h.client.Get(h.ctx, image)
	if err != nil {
		h.t.Fatal(err)
	}
	birth := h.kernel.device(image).Birth
	at, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{Binary: program})
	if err != nil {
		h.t.Fatal(err)
	}
	if want := filepath.Base(program); program != "" && at.Version != want || at.Phase != Serving || at.PID == before.PID || at.Problem != "" {
		h.t.Errorf("upgraded to %s: %+v, was %+v", program, at, before)
	}
	if h.kernel.device(image).Birth != birth {
		h.t.Error("the device is another one")
	}
	return at
}

func TestUpgrade_OneOpenerAtATime(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	first := h.attach(image)
	h.upgrade(image, h.newProgram("newer"))
	if at := h.upgrade(image, ""); at.Version != first.Version {
		t.Errorf("upgraded to the supervisor's own program: %+v, want version %s", at, first.Version)
	}
	h.detach(image)
	if events := h.events(image); !slices.Equal(events, []string{"open", "close", "open", "close", "open", "close"}) {
		t.Errorf("image: %v, want each server to have closed it", events)
	}
}

// Servers that are started later, by whichever supervisor, are of the program that was
// upgraded to.
func TestUpgrade_Lasts(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	at := h.upgrade(image, h.newProgram("newer"))
	killServer(t, at.PID)
	at = h.waitRestart(image, at.PID)
	h.end()
	h.startHere()
	if now := h.waitPhase(image, Serving); now.PID != at.PID || now.Version != "newer" {
		t.Errorf("adopted: %+v, want %+v", now, at)
	}
	killServer(t, at.PID)
	if at = h.waitRestart(image, at.PID); at.Version != "newer" {
		t.Errorf("started by the next supervisor: %+v", at)
	}
	h.detach(image)
}

func TestUpgrade_SuccessorDoesNotStart(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	at := h.attach(image)
	text := filepath.Join(h.dir, "text")
	h.write(text, "no program")
	for name, c := range map[string]struct {
		binary string
		want   error
		says   string
	}{
		"none":           {filepath.Join(h.dir, "none"), block.ErrNotFound, "none"},
		"relative path":  {"newer", block.ErrInvalid, "absolute path"},
		"not executable": {text, block.ErrInvalid, "executable"},
		"ends at once":   {"/bin/false", nil, "exit status 1"},
	} {
		_, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{Binary: c.binary})
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %v with %q", name, err, c.want, c.says)
		}
		if now, err := h.client.Get(h.ctx, image); err != nil || now.PID != at.PID || now.Phase != Serving || now.Problem != "" {
			t.Errorf("%s: %+v, %v, want nothing to have changed", name, now, err)
		}
	}
	h.detach(image)
	if events := h.events(image); !slices.Equal(events, []string{"open", "close"}) {
		t.Errorf("image: %v", events)
	}
}

// When the old server has ended and the successor cannot open the image, the program that
// served before does again, also if its file is gone.
func TestUpgrade_SuccessorCannotOpen(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	good := h.newProgram("good")
	at := h.upgrade(image, good)
	h.remove(good)
	_, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{Binary: h.newProgram("cannot-open")})
	if !errors.Is(err, block.ErrUnsupported) || !strings.Contains(err.Error(), "this program can't") {
		t.Errorf("upgrade: %v", err)
	}
	now := h.waitPhase(image, Serving)
	if now.Version != "good" || now.PID == at.PID || now.Problem != "" {
		t.Errorf("after the upgrade failed: %+v", now)
	}
	// The program's path leads nowhere: others take its place.
	killServer(t, now.PID)
	h.waitRestart(image, now.PID)
	h.detach(image)
}

// A program that cannot serve does not keep one from serving that can.
func TestServerKilled_ProgramUnfit(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	program := h.newProgram("newer")
	at := h.upgrade(image, program)
	bad := filepath.Join(h.dir, "bad")
	if err := os.WriteFile(bad, []byte("#!/bin/sh\nexit 7\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(bad, program); err != nil {
		t.Fatal(err)
	}
	killServer(t, at.PID)
	if now := h.waitRestart(image, at.PID); now.Version != "newer" {
		t.Errorf("after the program was replaced by a bad one: %+v", now)
	}
	h.detach(image)
}

func TestUpgrade_NotServing(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	if _, err := h.client.Upgrade(h.ctx, "none", UpgradeRequest{}); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("upgrade of nothing: %v", err)
	}
	image := h.newImage("disk")
	at := h.attach(image)
	h.write(image+".fail-open", "corrupt")
	killServer(t, at.PID)
	h.waitPhase(image, Recovering)
	if _, err := h.client.Upgrade(h.ctx, image, UpgradeRequest{}); !errors.Is(err, block.ErrBusy) {
		t.Errorf("upgrade of what is not served: %v, want %v", err, block.ErrBusy)
	}
	h.remove(image + ".fail-open")
	h.waitPhase(image, Serving)
	h.detach(image)
}

// A successor that hangs while it opens does not keep a detach by force from its work.
func TestUpgrade_StuckThenForced(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	image := h.newImage("disk")
	h.attach(image)
	h.write(image+".slow-open", "")
	stuck := make(chan error, 1)
	go func() { stuck <- second(h.client.Upgrade(h.ctx, image, UpgradeRequest{})) }()
	h.waitPhase(image, Recovering)
	if err := h.client.Detach(h.ctx, image, true); err != nil {
		t.Error(err)
	}
	if err := <-stuck; err == nil {
		t.Error("the upgrade that was stuck succeeded")
	}
	h.checkGone(image)
}

func TestUpgradeAll(t *testing.T) {
	h := newHarness(t)
	h.startHere()
	images := []string{h.newImage("a"), h.newImage("b"), h.newImage("c")}
	for _, image := range images {
		h.attach(image)
	}
	newer := h.newProgram("newer")
	h.upgrade(images[1], newer)
	check := func(program string, replaced []bool, versions []string) {
		t.Helper()
		results, err := h.client.UpgradeAll(h.ctx, UpgradeRequest{Binary: program})
		if err != nil || len(results) != len(replaced) {
			t.Fatalf("%s: %+v, %v, want %d results", program, results, err, len(replaced))
		}
		for i, r := range results {
			if r.ID != images[i] || r.Replaced != replaced[i] || r.To != versions[i] {
				t.Errorf("%s: %+v, want replaced %v, version %s", program, r, replaced[i], versions[i])
			}
		}
	}
	check(newer, []bool{true, false, true}, []string{"newer", "newer", "newer"})
	// The first that fails is the last.
	check(h.newProgram("cannot-open"), []bool{false}, []string{"newer"})
	for _, image := range images {
		if at := h.waitPhase(image, Serving); at.Version != "newer" {
			t.Errorf("in the end: %+v", at)
		}
		h.detach(image)
	}
}

// A supervisor is replaced by another one with servers and devices left as they are.
func TestReplace(t *testing.T) {
	h := newHarness(t)
	if _, err := Ensure(h.ctx, h.ensureConfig()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_ = h.client.Detach(ctx, filepath.Join(h.dir, "disk"), true)
		if err := Stop(ctx, h.stateDir); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	image := h.newImage("disk")
	at := h.attach(image)
	before, err := h.client.Status(h.ctx)
	if err != nil {
		t.Fatal(err)
	}
	cfg := h.ensureConfig()
	cfg.Binary = h.newProgram("newer")
	if _, err := Replace(h.ctx, cfg); err != nil {
		t.Fatal(err)
	}
	after, err := h.client.Status(h.ctx)
	if err != nil || after.PID == before.PID || after.Attachments != 1 {
		t.Errorf("the next supervisor: %+v, %v; the one before: %+v", after, err, before)
	}
	if now := h.attach(image); now.PID != at.PID || now.Version != at.Version {
		t.Errorf("adopted: %+v, want %+v", now, at)
	}
	// Its servers are of its own program, by and by or when told.
	results, err := h.client.UpgradeAll(h.ctx, UpgradeRequest{})
	if err != nil || len(results) != 1 || !results[0].Replaced || results[0].To != "newer" {
		t.Errorf("upgraded: %+v, %v", results, err)
	}
	// A supervisor of the same program leaves them; it looks when it has taken them over.
	if _, err := Replace(h.ctx, cfg); err != nil {
		t.Fatal(err)
	}
	results, err = h.client.UpgradeAll(h.ctx, UpgradeRequest{})
	if err != nil || len(results) != 1 || results[0].Replaced || results[0].From != "newer" || results[0].Problem != "" {
		t.Errorf("upgraded to the same: %+v, %v", results, err)
	}
	h.detach(image)
	if err := Stop(h.ctx, h.stateDir); err != nil {
		t.Error(err)
	}
	if _, err := Replace(h.ctx, cfg); err != nil {
		t.Errorf("replacing none: %v", err)
	}
}

// A supervisor of another program that somebody else starts meanwhile is replaced, too.
func TestReplace_SomebodyElseStartsOne(t *testing.T) {
	h := newHarness(t)
	h.stopAfterwards()
	ctx, cancel := context.WithCancel(h.ctx)
	var others sync.WaitGroup
	others.Go(func() {
		for ctx.Err() == nil {
			// What it starts may be ended each time.
			if _, err := Ensure(ctx, h.ensureConfig()); err != nil && ctx.Err() == nil && !errors.Is(err, ErrNotRunning) {
				t.Error(err)
			}
		}
	})
	cfg := h.ensureConfig()
	cfg.Binary = h.newProgram("newer")
	for range 5 {
		client, err := Replace(h.ctx, cfg)
		if err != nil {
			t.Error(err)
			break
		}
		status, err := client.Status(h.ctx)
		if err != nil || !runs(status.PID, cfg.Binary) {
			t.Errorf("the supervisor is %+v, %v, want one of %s", status, err, cfg.Binary)
		}
		if err := Stop(h.ctx, h.stateDir); err != nil {
			t.Error(err)
		}
	}
	cancel()
	others.Wait()
}
