package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/wire"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/all"
	"github.com/csi-imgdisk/csi-imgdisk/test/internal/node"
)

// config is what to do.
type config struct {
	duration   time.Duration
	seed       uint64
	binary     string // absolute
	dir        string
	volumes    int      // at the same time
	formats    []string // empty: all
	transports []string // empty: all that work
	out        io.Writer
}

const (
	// storeBytes is the size of the store's file system, whose file is sparse.
	storeBytes = 8 << 30
	// closePatience is how long cleaning up may take.
	closePatience = 5 * time.Minute
)

// soak is one under way.
type soak struct {
	config
	rng    *rand.Rand // for the goroutine that makes the others
	node   *node.Node
	store  *node.StoreFS
	tally  *tally
	dir    string // of the store's file system
	runDir string // on tmpfs
	kinds  []kind // of volumes, in the order in which they come to life

	mu       sync.Mutex
	born     int           // volumes so far
	failure  chan struct{} // closed at the first error
	failOnce sync.Once
}

// kind is what a volume is made of.
type kind struct{ format, transport string }

// run runs a soak to its end and tells of it. It returns an error if anything went wrong,
// and cleans up in any case, also when ctx ends early.
func run(ctx context.Context, c config) error {
	if os.Geteuid() != 0 {
		return errors.New("devices are made and mounted: root is needed")
	}
	s := &soak{config: c, rng: rand.New(rand.NewPCG(c.seed, 0)), failure: make(chan struct{}), tally: newTally()}
	fmt.Fprintf(c.out, "soak: %v; replay with IMGDISK_SEED=%d\n", c.duration, c.seed)
	err := s.prepare(ctx)
	if err == nil {
		s.soak(ctx)
	}
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), closePatience)
	defer cancel()
	s.failed("clean up", s.close(s.endNode(clean, ctx.Err() != nil)))
	s.tally.print(c.out)
	switch {
	case err != nil:
		return err
	case s.tally.errors() > 0:
		return fmt.Errorf("%d errors", s.tally.errors())
	case ctx.Err() != nil:
		return errors.New("interrupted; nothing is left behind")
	}
	return nil
}

// prepare makes directories, the store's file system, and a node on it.
func (s *soak) prepare(ctx context.Context) error {
	var err error
	if s.dir, err = os.MkdirTemp(s.config.dir, "imgdisk-soak-"); err != nil {
		return err
	}
	if s.runDir, err = os.MkdirTemp("/dev/shm", "imgdisk-soak-"); err != nil {
		return fmt.Errorf("the state's directory has to be on tmpfs: %w", err)
	}
	if s.store, err = node.MakeStoreFS(ctx, s.dir, storeBytes); err != nil {
		return err
	}
	s.node, err = node.Start(ctx, node.Config{
		Binary: s.binary, Store: s.store.Path, Dir: s.runDir,
		Name: strings.TrimPrefix(filepath.Base(s.runDir), "imgdisk-"),
	})
	if err != nil {
		return err
	}
	return s.chooseKinds(ctx)
}

// chooseKinds combines formats and transports.
func (s *soak) chooseKinds(ctx context.Context) error {
	if len(s.transports) == 0 {
		status, err := s.node.Supervisor().Status(ctx)
		if err != nil {
			return err
		}
		for _, t := range status.Transports {
			if t.Problem == "" {
				s.transports = append(s.transports, t.Name)
			}
		}
	}
	if len(s.formats) == 0 {
		all.Register()
		for _, f := range wire.Formats() {
			s.formats = append(s.formats, f.Name)
		}
	}
	if len(s.transports) == 0 {
		return errors.New("no transport works here: csi-imgdisk's supervisor says why in its log")
	}
	for _, format := range s.formats {
		for _, transport := range s.transports {
			s.kinds = append(s.kinds, kind{format, transport})
		}
	}
	s.rng.Shuffle(len(s.kinds), func(i, j int) { s.kinds[i], s.kinds[j] = s.kinds[j], s.kinds[i] })
	fmt.Fprintf(s.out, "soak: formats %s; transports %s\n", strings.Join(s.formats, ", "), strings.Join(s.transports, ", "))
	return nil
}

// soak lets volumes live until the time is up, something fails, or ctx ends.
func (s *soak) soak(ctx context.Context) {
	over, cancel := context.WithTimeout(ctx, s.duration)
	defer cancel()
	go func() {
		select {
		case <-s.failure: // what is under way may be looked at
			cancel()
		case <-over.Done():
		}
	}()
	var lives, havoc sync.WaitGroup
	for range s.volumes {
		rng := rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
		lives.Go(func() {
			for over.Err() == nil {
				s.live(ctx, over, rng)
			}
		})
	}
	rng := rand.New(rand.NewPCG(s.rng.Uint64(), s.rng.Uint64()))
	havoc.Go(func() { s.havoc(over, rng) })
	s.report(over)
	havoc.Wait()
	lives.Wait()
}

// reportInterval is between two lines that say how it goes.
const reportInterval = time.Minute

// report says from time to time what has happened, until ctx ends.
func (s *soak) report(ctx context.Context) {
	start, ticker := time.Now(), time.NewTicker(reportInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			fmt.Fprintf(s.out, "soak: after %v: %s\n", time.Since(start).Round(time.Second), s.tally)
		}
	}
}

// failed notes an error, unless err is nil, and ends the soak.
func (s *soak) failed(what string, err error) {
	if err == nil {
		return
	}
	fmt.Fprintf(s.out, "soak: %s: %v\n", what, err)
	s.tally.add(eventError)
	s.failOnce.Do(func() {
		if s.node != nil {
			fmt.Fprintln(s.out, s.node.Log())
		}
		close(s.failure)
	})
}

// nextKind returns what the next volume is made of, and its name.
func (s *soak) nextKind() (kind, string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[s.born%len(s.kinds)]
	s.born++
	return k, fmt.Sprintf("%s-%s-%d", k.format, k.transport, s.born)
}

// endNode ends the node and checks the store, unless the soak was interrupted: then
// volumes are still attached.
func (s *soak) endNode(ctx context.Context, interrupted bool) error {
	switch {
	case s.node == nil:
		return nil
	case interrupted:
		return s.node.Abandon(ctx)
	}
	return errors.Join(s.node.Close(ctx), s.checkStore(ctx))
}

// close removes all that was made, once the node has ended, well or not: then what could
// tell why stays.
func (s *soak) close(nodeErr error) error {
	errs := []error{nodeErr}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w; see %s and %s", err, s.dir, s.runDir)
	}
	for _, dir := range []string{s.dir, s.runDir} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// checkStore has the store examined: after all volumes' ends it should be empty.
func (s *soak) checkStore(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, s.binary, "store", "check", s.store.Path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("store check: %w: %s", err, out)
	}
	return nil
}
