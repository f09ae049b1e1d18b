package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// scenario is a life of an attachment whose supervisor may be killed at any step.
type scenario struct {
	name string
	run  func(c *crashing, image string)
}

var scenarios = []scenario{
	{"attach, resize, detach", func(c *crashing, image string) {
		c.attach(image)
		if err := os.Truncate(image, 2*imageBytes); err != nil {
			c.t.Fatal(err)
		}
		c.do("resize", func() error { return second(c.client.Resize(c.ctx, image)) }, block.ErrBusy)
		if got := c.kernel.device(image).SizeBytes; got != 2*imageBytes {
			c.t.Errorf("the device has %d bytes, want %d", got, 2*imageBytes)
		}
		c.detach(image)
	}},
	{"server killed", func(c *crashing, image string) {
		c.attach(image)
		birth := c.kernel.device(image).Birth
		c.waitServing(image, c.killServer(image))
		if c.kernel.device(image).Birth != birth {
			c.t.Error("the device is another one")
		}
		c.detach(image)
	}},
	{"upgrade", func(c *crashing, image string) {
		newer := c.newProgram("newer")
		c.attach(image)
		birth := c.kernel.device(image).Birth
		c.do("upgrade", func() error {
			return second(c.client.Upgrade(c.ctx, image, UpgradeRequest{Binary: newer}))
		}, block.ErrBusy)
		c.waitServing(image, 0)
		if at, err := c.client.Get(c.ctx, image); err != nil || c.crashes == 0 && at.Version != "newer" {
			c.t.Errorf("upgraded: %+v, %v", at, err)
		}
		if c.kernel.device(image).Birth != birth {
			c.t.Error("the device is another one")
		}
		c.detach(image)
	}},
	{"upgrade that fails", func(c *crashing, image string) {
		broken := c.newProgram("cannot-open")
		c.attach(image)
		c.do("upgrade", func() error {
			err := second(c.client.Upgrade(c.ctx, image, UpgradeRequest{Binary: broken}))
			if errors.Is(err, block.ErrUnsupported) {
				return nil
			}
			return fmt.Errorf("upgrade to a program that can't open: %w", err)
		}, block.ErrBusy)
		c.waitServing(image, 0)
		c.detach(image)
	}},
	{"attach that fails", func(c *crashing, image string) {
		c.write(image+".fail-open", "corrupt")
		c.do("attach", func() error {
			err := second(c.client.Attach(c.ctx, request(image)))
			if errors.Is(err, block.ErrCorrupt) {
				return nil
			}
			return err
		})
		c.remove(image + ".fail-open")
	}},
	{"detach of a busy device", func(c *crashing, image string) {
		c.attach(image)
		c.write(c.kernel.path(image, ".busy"), "")
		c.do("detach", func() error {
			err := c.client.Detach(c.ctx, image, false)
			if errors.Is(err, block.ErrBusy) {
				return nil
			}
			return fmt.Errorf("detach of a busy device: %w", err)
		})
		c.waitServing(image, 0)
		c.remove(c.kernel.path(image, ".busy"))
		c.detach(image)
	}},
	{"detach by force", func(c *crashing, image string) {
		c.attach(image)
		c.write(c.kernel.path(image, ".busy"), "")
		c.do("detach", func() error { return c.client.Detach(c.ctx, image, true) }, block.ErrNotFound)
	}},
	{"close fails", func(c *crashing, image string) {
		c.attach(image)
		c.write(image+".fail-close", "")
		c.do("detach", func() error {
			err := c.client.Detach(c.ctx, image, false)
			if errors.Is(err, block.ErrNoSpace) {
				return nil
			}
			return fmt.Errorf("detach with a full store: %w", err)
		})
		c.remove(image + ".fail-close")
		c.detach(image)
	}},
	{"fenced", func(c *crashing, image string) {
		c.attach(image)
		c.write(image+".lost", "")
		c.waitFor(image, Lost)
		c.remove(image + ".lost")
		c.detach(image)
	}},
	{"device lost", func(c *crashing, image string) {
		c.attach(image)
		if err := c.kernel.Abort(c.ctx, attach.State{Spec: attach.Spec{ID: image}}); err != nil {
			c.t.Fatal(err)
		}
		c.killServer(image)
		c.waitFor(image, Lost)
		c.attach(image)
		c.detach(image)
	}},
}

// TestKilledAtEveryStep kills the supervisor at every step of every scenario, once
// each, and checks that the next one makes it come out as if nothing had happened.
func TestKilledAtEveryStep(t *testing.T) {
	total := 0
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			steps := countSteps(t, sc)
			total += len(steps)
			for i, step := range steps {
				if testing.Short() && i%5 != 0 {
					continue
				}
				t.Run(fmt.Sprintf("%d %s", i, step), func(t *testing.T) {
					c := newCrashing(t, crashAt(i))
					c.play(sc)
					if c.crashes != 1 {
						t.Errorf("the supervisor ended %d times, want once, at step %d", c.crashes, i)
					}
				})
			}
		})
	}
	t.Logf("%d steps", total)
}

func crashAt(step int) []string { return []string{fmt.Sprintf("crash=%d", step)} }

// TestKilledAgain kills supervisors while they repair what others left.
func TestKilledAgain(t *testing.T) {
	rng := testenv.Rand(t)
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		sc := scenarios[rng.IntN(len(scenarios))]
		first, second, third := rng.IntN(25), rng.IntN(8), rng.IntN(8)
		t.Run(fmt.Sprintf("%s %d %d %d", sc.name, first, second, third), func(t *testing.T) {
			newCrashing(t, crashAt(first), crashAt(second), crashAt(third)).play(sc)
		})
	}
}

// countSteps plays a scenario undisturbed and returns the steps it comes by.
func countSteps(t *testing.T, sc scenario) []string {
	c := newCrashing(t)
	list := filepath.Join(c.dir, "steps")
	c.args = [][]string{{"steps=" + list}}
	c.play(sc)
	content, err := os.ReadFile(list)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(content)), "\n")
}

// crashing is a harness that starts a supervisor again when one has ended.
type crashing struct {
	*harness
	args    [][]string // for the first supervisor, the second, and so on
	crashes int
}

func newCrashing(t *testing.T, args ...[]string) *crashing {
	return &crashing{harness: newHarness(t), args: args}
}

// startNext starts the next supervisor.
func (c *crashing) startNext() {
	c.t.Helper()
	var args []string
	if len(c.args) > 0 {
		args, c.args = c.args[0], c.args[1:]
	}
	c.startProcess(args...)
}

func (c *crashing) play(sc scenario) {
	c.t.Helper()
	c.startNext()
	image := c.newImage("disk")
	sc.run(c, image)
	c.revive()
	if list, err := c.client.List(c.ctx); err != nil || len(list) != 0 {
		c.t.Errorf("left in the end: %+v, %v", list, err)
	}
	c.checkGone(image)
}

// revive starts a supervisor if the last one has ended, or is about to.
func (c *crashing) revive() {
	c.t.Helper()
	if !c.hasEnded() {
		if err := answers(c.ctx, c.client); !errors.Is(err, ErrNotRunning) {
			return
		}
		<-c.ended
	}
	c.crashes++
	c.startNext()
}

// do repeats an operation as a client would: while no supervisor answers, and after
// one was killed also after the errors that a repetition may meet.
func (c *crashing) do(what string, f func() error, after ...error) {
	c.t.Helper()
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		expected := errors.Is(err, ErrNotRunning)
		for _, e := range after {
			if c.crashes > 0 && errors.Is(err, e) {
				if e == block.ErrNotFound {
					return // what was asked for had been done
				}
				expected = true
			}
		}
		if !expected || time.Since(start) > patience {
			c.t.Fatalf("%s: %v", what, err)
		}
		c.revive()
	}
}

func (c *crashing) attach(image string) {
	c.t.Helper()
	c.do("attach", func() error { return second(c.client.Attach(c.ctx, request(image))) })
	if c.kernel.device(image).ID == "" {
		c.t.Fatal("attached, and there is no device")
	}
}

func (c *crashing) detach(image string) {
	c.t.Helper()
	c.do("detach", func() error { return c.client.Detach(c.ctx, image, false) }, block.ErrNotFound)
	c.checkGone(image)
}

// killServer kills the attachment's server, and returns its process id.
func (c *crashing) killServer(image string) (pid int) {
	c.t.Helper()
	c.do("get", func() error {
		at, err := c.client.Get(c.ctx, image)
		if err == nil && at.PID == 0 {
			err = fmt.Errorf("no server runs yet: %w", ErrNotRunning)
		}
		pid = at.PID
		return err
	})
	killServer(c.t, pid)
	return pid
}

// waitServing waits until an attachment is served, by another process than pid.
func (c *crashing) waitServing(image string, pid int) {
	c.t.Helper()
	c.eventually("a server", func() error {
		c.revive()
		at, err := c.client.Get(c.ctx, image)
		if err == nil && (at.Phase != Serving || at.PID == 0 || at.PID == pid) {
			err = fmt.Errorf("%+v", at)
		}
		return err
	})
}

func (c *crashing) waitFor(image string, phase Phase) {
	c.t.Helper()
	c.eventually("phase "+string(phase), func() error {
		c.revive()
		at, err := c.client.Get(c.ctx, image)
		if err == nil && at.Phase != phase {
			err = fmt.Errorf("%+v", at)
		}
		return err
	})
}
