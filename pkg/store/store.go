package store

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// Options shape an open store; zero values are defaults.
type Options struct {
	// ReadOnly looks only: whatever would change the store fails with ErrReadOnly.
	ReadOnly bool
	// MaxChain is the most layers a volume may stand on, 32 by default.
	MaxChain int
	// PollInterval is how often a holder looks for wishes, and whether the volume is
	// still its own, while the volume is used: 300 ms by default. While it is not, it
	// looks an eighth as often, and at once when it is used again.
	PollInterval time.Duration
	// MergeInterval is how long a holder waits between two tries to shorten its chain:
	// 30 s by default.
	MergeInterval time.Duration
	// HolderWait is how long Attach and DeleteVolume wait for a previous holder of
	// the volume to go: 20 s by default.
	HolderWait time.Duration
	// FinishCreations lets CreateVolume go on in the background when its context ends,
	// for services: the same call again joins it, DeleteVolume and Close end it.
	// Otherwise the end of the context ends the creation.
	FinishCreations bool
}

const (
	defaultMaxChain     = 32
	defaultPollInterval = 300 * time.Millisecond
	defaultHolderWait   = 20 * time.Second

	defaultMergeInterval = 30 * time.Second
	idlePolls            = 8 // intervals

	// Who made a wish looks whether it is fulfilled, at first often.
	wishPollMin = 60 * time.Millisecond
	wishPollMax = time.Second
)

func (o *Options) setDefaults() {
	if o.MaxChain <= 0 {
		o.MaxChain = defaultMaxChain
	}
	if o.PollInterval <= 0 {
		o.PollInterval = defaultPollInterval
	}
	if o.MergeInterval <= 0 {
		o.MergeInterval = defaultMergeInterval
	}
	if o.HolderWait <= 0 {
		o.HolderWait = defaultHolderWait
	}
}

// Store is an open store. All methods are safe for concurrent use, also by any number of
// processes on any number of nodes.
type Store struct {
	name    string
	id      string
	fs      vfs.FS
	opts    Options
	locks   locker
	batches batches

	creations creations
}

// identity is store.json.
type identity struct {
	Layout  int       `json:"layout"`
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// Init makes a store of the directory fs and returns its identity. A store that exists
// already is left as it is, apart from directories that are missing in it.
func Init(fsys vfs.FS) (id string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("make a store: %w", err)
		}
	}()
	for _, dir := range []string{volumesDir, imagesDir} {
		if err := fsys.Mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	// Whoever comes second waits, and finds the first one's identity.
	locks := locker{fs: fsys, local: map[string]chan struct{}{}}
	lock, err := locks.lock(context.Background(), storeLock)
	if err != nil {
		return "", err
	}
	defer lock.Unlock()
	if err := makeSpares(fsys); err != nil {
		return "", err
	}
	if ident, err := readIdentity(fsys); !errors.Is(err, fs.ErrNotExist) {
		return ident.ID, err
	}
	ident := identity{Layout: layoutVersion, ID: rand.Text(), Created: time.Now().UTC()}
	data, err := json.MarshalIndent(ident, "", "  ")
	if err != nil {
		return "", err
	}
	return ident.ID, replaceFile(fsys, identityFile, identityFile+".new", append(data, '\n'))
}

func readIdentity(fsys vfs.FS) (identity, error) {
	data, err := readSmallFile(fsys, identityFile)
	if err != nil {
		return identity{}, err
	}
	var ident identity
	if err := json.Unmarshal(data, &ident); err != nil || ident.ID == "" {
		return identity{}, fmt.Errorf("%s: %w: it is not what a store's identity looks like", identityFile, block.ErrCorrupt)
	}
	if ident.Layout != layoutVersion {
		return identity{}, fmt.Errorf("%s: layout %d: %w: this program knows %d", identityFile, ident.Layout, block.ErrUnsupported, layoutVersion)
	}
	return ident, nil
}

// Open opens the store in fs, which it closes in the end; name is how handles and
// messages call it. A store that cannot be written, or whose locks do not keep others
// out, is refused, unless it is opened ReadOnly. On an error fs stays open.
func Open(ctx context.Context, name string, fsys vfs.FS, opts Options) (*Store, error) {
	opts.setDefaults()
	if err := checkName("store", name); err != nil {
		return nil, err
	}
	ident, err := readIdentity(fsys)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open store %s: %w: %w: there is no %s; make a store of the directory first (csi-imgdisk store init)",
			name, block.ErrNotFound, err, identityFile)
	}
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", name, err)
	}
	if !opts.ReadOnly {
		if err := probeLocks(ctx, fsys); err != nil {
			return nil, fmt.Errorf("open store %s: %w", name, err)
		}
	}
	s := &Store{name: name, id: ident.ID, fs: fsys, opts: opts}
	s.locks = locker{fs: fsys, local: map[string]chan struct{}{}}
	return s, nil
}

// Name returns the store's name.
func (s *Store) Name() string { return s.name }

// ID returns the identity the store got when it was made.
func (s *Store) ID() string { return s.id }

// Usage returns the capacity of the file system the store lies on.
func (s *Store) Usage() (vfs.Usage, error) { return s.fs.Usage() }

// Close ends what goes on in the background and releases the store. Volumes that are
// attached must be closed before.
func (s *Store) Close() error {
	s.creations.stopAll()
	return s.fs.Close()
}

// writable returns why the store cannot be changed, or nil.
func (s *Store) writable() error {
	if s.opts.ReadOnly {
		return fmt.Errorf("store %s is open for looking only: %w", s.name, block.ErrReadOnly)
	}
	return nil
}
