package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/storemount"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver/wire"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/store"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

const (
	defaultMountDir = "/var/lib/csi-imgdisk/stores"
	// A store that cannot be mounted or opened is tried again, first soon.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// closePatience is how long stores may take to close: one may hang.
	closePatience = 5 * time.Second
)

// storeFlags say where stores are, for the services of a cluster. The same in all of them
// means the same stores.
type storeFlags struct {
	config   string
	named    []string // NAME=PATH
	mountDir string
}

func (f *storeFlags) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.config, "store-config", "", "JSON file that declares stores: directories, NFS exports, SMB shares (docs/install.md)")
	flags.StringArrayVar(&f.named, "store", nil, "NAME=PATH of a store in a directory; may be given several times")
	flags.StringVar(&f.mountDir, "mount-dir", defaultMountDir, "directory below which NFS exports and SMB shares are mounted")
}

// given says whether there is any store.
func (f *storeFlags) given() bool { return f.config != "" || len(f.named) > 0 }

// list returns the stores of the file and of the flags.
func (f *storeFlags) list() ([]storemount.Store, error) {
	var list []storemount.Store
	for _, flag := range f.named {
		named, err := parseStore(flag)
		if err != nil {
			return nil, err
		}
		list = append(list, storemount.Store{Name: named.name, Path: named.path})
	}
	if f.config != "" {
		declared, err := storemount.ReadConfig(f.config)
		if err != nil {
			return nil, err
		}
		list = append(list, declared...)
	}
	return list, storemount.Validate(list)
}

// roots returns the stores' directories by name.
func (f *storeFlags) roots() (map[string]string, error) {
	list, err := f.list()
	if err != nil {
		return nil, err
	}
	mounts := storemount.New(f.mountDir)
	roots := map[string]string{}
	for _, s := range list {
		roots[s.Name] = mounts.Root(s)
	}
	return roots, nil
}

// retry does something until it succeeds or ctx ends, less and less often. told gets each
// outcome that differs from the one before; the last is nil.
func retry(ctx context.Context, do func() error, told func(error)) error {
	last := ""
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		err := do()
		if err == nil {
			told(nil)
			return nil
		}
		if text := err.Error(); text != last {
			told(err)
			last = text
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// keepMounted mounts stores and says in a status directory which are not mounted yet, and
// why. It returns at once.
func (f *storeFlags) keepMounted(ctx context.Context, status storemount.Status) error {
	list, err := f.list()
	if err != nil {
		return err
	}
	mounts, log := storemount.New(f.mountDir), klog.FromContext(ctx)
	for _, s := range list {
		if s.Path != "" {
			if err := status.Set(s.Name, nil); err != nil { // it may have been a share before
				return err
			}
			continue
		}
		if err := status.Set(s.Name, errors.New("it is being mounted")); err != nil {
			return err
		}
		go func() {
			_ = retry(ctx, func() error { return mounts.Mount(s) }, func(err error) {
				if err != nil {
					log.Error(err, "the store is not mounted; it is tried again", "store", s.Name)
				} else {
					log.Info("the store is mounted", "store", s.Name)
				}
				if err := status.Set(s.Name, err); err != nil {
					log.Error(err, "the node plugin is not told")
				}
			})
		}()
	}
	return nil
}

// storeSet are a controller's stores, some of which may not be there yet.
type storeSet struct {
	mounts *storemount.Mounts
	late   map[string]*wire.LateStore
	gauges *storeGauges

	mu     sync.Mutex
	opened []*openedStore
}

// openLater returns stores that are going to be mounted and opened, each on its own.
func openLater(ctx context.Context, flags *storeFlags) (*storeSet, error) {
	list, err := flags.list()
	if err != nil {
		return nil, err
	}
	s := &storeSet{
		mounts: storemount.New(flags.mountDir), late: map[string]*wire.LateStore{}, gauges: newStoreGauges(),
	}
	for _, declared := range list {
		s.late[declared.Name] = &wire.LateStore{}
		s.gauges.ready(declared.Name, false)
	}
	for _, declared := range list {
		go s.keep(ctx, declared)
	}
	return s, nil
}

// keep opens a store, and then looks after it, until ctx ends.
func (s *storeSet) keep(ctx context.Context, declared storemount.Store) {
	late, log := s.late[declared.Name], klog.FromContext(ctx).WithValues("store", declared.Name)
	var opened *openedStore
	err := retry(ctx, func() (err error) {
		opened, err = s.open(ctx, declared)
		return err
	}, func(err error) {
		if err != nil {
			log.Error(err, "the store is not there; it is tried again")
			late.SetProblem(err)
		}
	})
	if err != nil {
		return // told to stop
	}
	s.mu.Lock()
	s.opened = append(s.opened, opened)
	s.mu.Unlock()
	late.Set(wire.Store(opened.Store))
	s.gauges.ready(declared.Name, true)
	log.Info("the store is open", "root", opened.path)
	s.lookAfter(ctx, opened)
}

func (s *storeSet) open(ctx context.Context, declared storemount.Store) (*openedStore, error) {
	if err := s.mounts.Mount(declared); err != nil {
		return nil, err
	}
	at := namedStore{declared.Name, s.mounts.Root(declared)}
	opened, err := at.open(ctx, store.Options{FinishCreations: true})
	if !errors.Is(err, block.ErrNotFound) || !declared.Init {
		return opened, err
	}
	if err := at.init(); err != nil {
		return nil, err
	}
	return at.open(ctx, store.Options{FinishCreations: true})
}

// init makes a store of a directory that is empty. One with something else in it may be
// the wrong one, or what a mount should have covered.
func (n namedStore) init() error {
	dir, err := vfs.OpenDir(n.path)
	if err != nil {
		return fmt.Errorf("store %s: %w", n.name, err)
	}
	defer dir.Close()
	entries, err := dir.ReadDir(".")
	if err != nil {
		return fmt.Errorf("store %s: %w", n.name, err)
	}
	var others []string
	for _, e := range entries {
		if !ofStore(e.Name()) {
			others = append(others, e.Name())
		}
	}
	if len(others) > 0 {
		return fmt.Errorf("store %s: %s is no store, and not empty: %w: there is %.200q; make it one with csi-imgdisk store init",
			n.name, n.path, block.ErrExists, strings.Join(others, ", "))
	}
	_, err = store.Init(dir)
	return err
}

// ofStore says whether a name may be part of a store that another replica is making, or of
// an empty file system.
func ofStore(name string) bool {
	return strings.HasPrefix(name, ".") ||
		slices.Contains([]string{"volumes", "images", "spare", "lost+found", "store.json", "store.json.new", "store.lock"}, name)
}

// lookAfter rids a store of what nothing needs, and measures it, until ctx ends. Several
// replicas may do so at once.
func (s *storeSet) lookAfter(ctx context.Context, opened *openedStore) {
	log := klog.FromContext(ctx).WithValues("store", opened.Name())
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	var collected time.Time
	for {
		if usage, err := opened.Usage(); err == nil {
			s.gauges.available(opened.Name(), usage.FreeBytes)
		}
		if time.Since(collected) >= collectInterval {
			if _, err := opened.GC(ctx); err != nil && ctx.Err() == nil {
				log.Error(err, "collect garbage")
			}
			collected = time.Now()
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// forDriver returns the stores as the driver knows them.
func (s *storeSet) forDriver() map[string]driver.Store {
	list := map[string]driver.Store{}
	for name, late := range s.late {
		list[name] = late
	}
	return list
}

// problems says which stores are not there, and why.
func (s *storeSet) problems() error {
	var list []error
	for name, late := range s.late {
		if err := late.Problem(); err != nil {
			list = append(list, fmt.Errorf("store %s: %w", name, err))
		}
	}
	return errors.Join(list...)
}

// close closes the stores, but does not wait long for one that hangs: what matters is in
// the stores already.
func (s *storeSet) close() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, opened := range s.opened {
			_ = opened.Close() // nothing is written by closing
		}
	}()
	select {
	case <-done:
	case <-time.After(closePatience):
	}
}
