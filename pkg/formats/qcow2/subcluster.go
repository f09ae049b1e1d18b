package qcow2

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// loan is a host cluster whose subclusters are being filled by requests that have been told
// their place and have not set the mapping yet. Several can be at it at once.
type loan struct {
	guest, host int64 // clusters
	users       int
	fresh       bool // no L2 entry refers to the host cluster yet
	zeroed      bool
}

// allocateSubclusters says where subclusters belong: into the host cluster that their
// cluster has or is about to get, or into new ones.
func (m *image) allocateSubclusters(off, n int64) (engine.Place, error) {
	cluster, in := off>>m.clusterBits, off&(m.clusterBytes-1)
	host, err := m.ownHost(cluster)
	if err != nil {
		return engine.Place{}, err
	}
	if host != 0 {
		return m.lend(cluster, host, in, min(n, m.clusterBytes-in)), nil
	}
	want := m.clusters(in + n)
	if in != 0 {
		want = 1
	}
	for i := int64(1); i < want; i++ {
		if host, err := m.ownHost(cluster + i); host != 0 || err != nil {
			want = i // whoever asks for it is told
		}
	}
	got, err := m.take(want, 1)
	if err != nil {
		return engine.Place{}, err
	}
	for i := range got.count {
		m.lent[got.first+i] = &loan{guest: cluster + i, host: got.first + i, users: 1, fresh: true, zeroed: got.zeroed}
	}
	return engine.Place{
		Span:   engine.Span{Off: got.first<<m.clusterBits + in, Len: min(n, got.count<<m.clusterBits-in)},
		Zeroed: got.zeroed,
	}, nil
}

// ownHost returns the host cluster's offset that a guest cluster alone has or is about to
// get, 0 if there is none.
func (m *image) ownHost(cluster int64) (int64, error) {
	// There are as many loans as requests in flight.
	for _, l := range m.lent {
		if l.fresh && l.guest == cluster {
			return l.host << m.clusterBits, nil
		}
	}
	if cluster > (m.sizeBytes-1)>>m.clusterBits {
		return 0, nil
	}
	p, _, err := m.entries(cluster)
	if p == nil || err != nil {
		return 0, err
	}
	e := m.at(p)
	if e.compressed() || !e.exclusive() || e.host() == 0 {
		return 0, nil
	}
	return e.host(), m.checkEntry(cluster, e, engine.Data)
}

// lend returns the place of n bytes in a host cluster.
func (m *image) lend(cluster, host, in, n int64) engine.Place {
	l := m.lent[host>>m.clusterBits]
	if l == nil {
		l = &loan{guest: cluster, host: host >> m.clusterBits}
		m.lent[l.host] = l
	}
	l.users++
	return engine.Place{Span: engine.Span{Off: host + in, Len: n}, Zeroed: l.zeroed}
}

// settleLoans ends loans of places that the mapping refers to now.
func (m *image) settleLoans(span engine.Span) {
	for c := span.Off >> m.clusterBits; c <= (span.Off+span.Len-1)>>m.clusterBits; c++ {
		if l := m.lent[c]; l != nil {
			l.fresh = false
			m.endLoan(l)
		}
	}
}

func (m *image) endLoan(l *loan) {
	if l.users--; l.users == 0 {
		delete(m.lent, l.host)
	}
}

// returnLoan takes back a place that was never set, and reports whether it was lent.
func (m *image) returnLoan(span engine.Span) bool {
	first, last := span.Off>>m.clusterBits, (span.Off+span.Len-1)>>m.clusterBits
	if m.lent[first] == nil {
		return false
	}
	for c := first; c <= last; c++ {
		l := m.lent[c]
		if l == nil {
			continue
		}
		l.zeroed = false
		m.endLoan(l)
		if l.users == 0 && l.fresh {
			m.giveUp(c, 1)
		}
	}
	return true
}
