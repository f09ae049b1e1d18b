package store

import (
	"context"
	"fmt"
)

// ChangeLimits changes what a volume may do in a second. The server that has it open sees
// the record within a second and obeys.
func (s *Store) ChangeLimits(ctx context.Context, name string, change func(*Limits)) (Record, error) {
	if err := checkVolumeName(name); err != nil {
		return Record{}, err
	}
	rec, err := s.update(ctx, name, func(rec *Record) error {
		if err := rec.exists(); err != nil {
			return err
		}
		change(&rec.Limits)
		return nil
	})
	if err != nil {
		return Record{}, fmt.Errorf("change the limits of volume %s: %w", name, err)
	}
	return rec, nil
}
