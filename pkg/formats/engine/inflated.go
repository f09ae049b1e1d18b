package engine

import "sync"

// inflatedCache keeps the granules inflated last: sequential reads of a compressed image
// ask for the same granule many times.
type inflatedCache struct {
	mu    sync.Mutex
	bytes int64
	order []inflatedKey // oldest first
	kept  map[inflatedKey][]byte
}

type inflatedKey struct {
	layer *Layer
	off   int64
}

const maxInflatedBytes = 4 << 20

// get returns a granule that must not be changed. Two callers may inflate one at once.
func (c *inflatedCache) get(key inflatedKey, inflate func() ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	b, ok := c.kept[key]
	c.mu.Unlock()
	if ok {
		return b, nil
	}
	b, err := inflate()
	if err != nil {
		return nil, err
	}
	c.put(key, b)
	return b, nil
}

func (c *inflatedCache) put(key inflatedKey, b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.kept[key]; ok {
		return
	}
	if c.kept == nil {
		c.kept = map[inflatedKey][]byte{}
	}
	for len(c.order) > 0 && c.bytes+int64(len(b)) > maxInflatedBytes {
		oldest := c.order[0]
		c.order = c.order[1:]
		c.bytes -= int64(len(c.kept[oldest]))
		delete(c.kept, oldest)
	}
	c.kept[key] = b
	c.order = append(c.order, key)
	c.bytes += int64(len(b))
}

// dropRange forgets what a layer held in a guest range whose mapping changes.
func (c *inflatedCache) dropRange(l *Layer, off, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.order[:0]
	for _, key := range c.order {
		if key.layer == l && key.off >= off && key.off < off+n {
			c.bytes -= int64(len(c.kept[key]))
			delete(c.kept, key)
			continue
		}
		kept = append(kept, key)
	}
	c.order = kept
}
