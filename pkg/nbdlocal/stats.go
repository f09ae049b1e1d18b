package nbdlocal

// Stats are what a Server has done since it was made.
type Stats struct {
	Connections int `json:"connections"` // in the transmission phase now
	InFlight    int `json:"inFlight"`    // requests received and not yet answered

	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"` // not counting FUA
	Zeroes       uint64 `json:"zeroes"`
	Trims        uint64 `json:"trims"`
	BlockStatus  uint64 `json:"blockStatus"`
	Errors       uint64 `json:"errors"`       // of the above and others, how many failed
	ReadBytes    uint64 `json:"readBytes"`    // of successful reads
	WrittenBytes uint64 `json:"writtenBytes"` // of successful writes
}

// Stats returns the counters as they are.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := s.past
	out := Stats{Connections: len(s.conns)}
	for c := range s.conns {
		c.mu.Lock()
		sum.add(&c.stats)
		out.InFlight += c.inFlight()
		c.mu.Unlock()
	}
	out.Reads, out.Writes, out.Flushes = sum.commands[cmdRead], sum.commands[cmdWrite], sum.commands[cmdFlush]
	out.Zeroes, out.Trims = sum.commands[cmdWriteZeroes], sum.commands[cmdTrim]
	out.BlockStatus = sum.commands[cmdBlockStatus]
	out.Errors, out.ReadBytes, out.WrittenBytes = sum.errors, sum.readBytes, sum.writtenBytes
	return out
}

// counters are one connection's, guarded by its lock.
type counters struct {
	commands                        [len(commandRules)]uint64
	errors, readBytes, writtenBytes uint64
}

func (n *counters) count(r *request) {
	if int(r.cmd) < len(n.commands) {
		n.commands[r.cmd]++
	}
	switch {
	case r.err != nil:
		n.errors++
	case r.cmd == cmdRead:
		n.readBytes += uint64(r.n)
	case r.cmd == cmdWrite:
		n.writtenBytes += uint64(r.n)
	}
}

func (n *counters) add(m *counters) {
	for i, v := range m.commands {
		n.commands[i] += v
	}
	n.errors += m.errors
	n.readBytes += m.readBytes
	n.writtenBytes += m.writtenBytes
}
