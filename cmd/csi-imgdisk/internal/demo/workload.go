package demo

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// recordBytes is the size of one record of a writer.
const recordBytes = 4096

// writer is an application that writes records to a file, each with a number and a sum,
// and syncs them, one after the other.
type writer struct {
	path string
	stop chan struct{}
	done chan struct{}

	mu      sync.Mutex
	synced  int64 // records that are durable
	longest time.Duration
	err     error
}

// startWriter starts an application that writes to a file.
func startWriter(path string) (*writer, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	w := &writer{path: path, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		err := errors.Join(w.write(f), f.Close())
		w.mu.Lock()
		defer w.mu.Unlock()
		w.err = err
	}()
	return w, nil
}

func (w *writer) write(f *os.File) error {
	for n := int64(0); ; n++ {
		select {
		case <-w.stop:
			return nil
		default:
		}
		start := time.Now()
		if _, err := f.Write(record(n)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		w.wrote(n+1, time.Since(start))
	}
}

func (w *writer) wrote(n int64, took time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.synced, w.longest = n, max(w.longest, took)
}

// progress returns how many records are durable, and resets and returns the longest time
// that one took.
func (w *writer) progress() (records int64, longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	records, longest = w.synced, w.longest
	w.longest = 0
	return records, longest
}

// end stops the writer, and returns how many records are durable.
func (w *writer) end() (records int64, err error) {
	close(w.stop)
	<-w.done
	return w.synced, w.err
}

// record is the n-th record.
func record(n int64) []byte {
	r := make([]byte, recordBytes)
	binary.LittleEndian.PutUint64(r, uint64(n))
	for i := 8; i < recordBytes-sha256.Size; i++ {
		r[i] = byte(n + int64(i))
	}
	sum := sha256.Sum256(r[:recordBytes-sha256.Size])
	copy(r[recordBytes-sha256.Size:], sum[:])
	return r
}

// verifyRecords checks that a file holds at least so many intact records.
func verifyRecords(path string, atLeast int64) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	got := make([]byte, recordBytes)
	for n := int64(0); ; n++ {
		_, err := io.ReadFull(f, got)
		if n >= atLeast && (err != nil || string(got) != string(record(n))) {
			return n, nil // a record that was not synced may be there in part
		}
		if err != nil {
			return n, fmt.Errorf("record %d of %d that were written: %w", n, atLeast, err)
		}
		if string(got) != string(record(n)) {
			return n, fmt.Errorf("record %d is not what was written", n)
		}
	}
}
