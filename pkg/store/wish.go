package store

import (
	"bytes"
	"context"
	"time"
)

// wishPause is a wait for a wish to be fulfilled, longer each time.
type wishPause time.Duration

func (p *wishPause) sleep(ctx context.Context) error {
	*p = wishPause(min(max(time.Duration(*p)*5/4, wishPollMin), wishPollMax))
	return sleep(ctx, time.Duration(*p))
}

// awaitHolder waits until it is time to look again, under the volume's lock, how far a wish
// is: when whoever serves the volume has changed its record. It reads that without the lock,
// which the holder needs. If nobody serves it, only time passes.
func (s *Store) awaitHolder(ctx context.Context, seen Record, pause *wishPause) error {
	before, err := encodeRecord(seen)
	if err != nil {
		return err
	}
	for {
		if err := pause.sleep(ctx); err != nil {
			return err
		}
		rec, err := s.readRecord(seen.Name)
		if err != nil || rec.serving() == "" {
			return nil // the look says what is wrong
		}
		if now, err := encodeRecord(rec); err != nil || !bytes.Equal(now, before) {
			return err
		}
	}
}
