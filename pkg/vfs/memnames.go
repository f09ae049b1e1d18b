package vfs

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// place is where a name is: an entry of a directory. The zero place is nowhere.
type place struct {
	dir  *memNode
	name string
}

// node returns what has the name, or nil.
func (p place) node() *memNode { return p.dir.entries[p.name] }

// nameChange is one change of directories: a creation has no from, a removal no to, and
// a rename both.
type nameChange struct {
	node     *memNode
	from, to place
	replaced *memNode // what had the name to, if anything
	// above is, for a move to another directory, that directory and those it lies in.
	above []*memNode
}

func (ch nameChange) isRemoval() bool { return ch.to.dir == nil }
func (ch nameChange) isMove() bool {
	return ch.from.dir != nil && ch.to.dir != nil && ch.from.dir != ch.to.dir
}
func (ch nameChange) in(dir *memNode) bool { return ch.from.dir == dir || ch.to.dir == dir }

// mapNodes returns ch with every node replaced.
func (ch nameChange) mapNodes(f func(*memNode) *memNode) nameChange {
	mapped := nameChange{node: f(ch.node), from: place{f(ch.from.dir), ch.from.name}, to: place{f(ch.to.dir), ch.to.name}, replaced: f(ch.replaced)}
	for _, n := range ch.above {
		mapped.above = append(mapped.above, f(n))
	}
	return mapped
}

// change applies ch to the live directories and remembers it as not yet durable.
func (m *Mem) change(ch nameChange) {
	if ch.isMove() {
		ch.above = append(m.parents(ch.to.dir), ch.to.dir)
	}
	if ch.from.dir != nil {
		delete(ch.from.dir.entries, ch.from.name)
	}
	if ch.to.dir != nil {
		ch.replaced = ch.to.node()
		ch.to.dir.entries[ch.to.name] = ch.node
		ch.node.parent = ch.to.dir
	}
	m.changes = append(m.changes, ch)
}

// parents returns the directories that dir lies in.
func (m *Mem) parents(dir *memNode) []*memNode {
	var list []*memNode
	for dir != m.root {
		dir = dir.parent
		list = append(list, dir)
	}
	return list
}

// nameTree is a state of all directories: the synced one, with changes on top.
type nameTree struct {
	root    *memNode
	changed map[*memNode]map[string]*memNode
}

// entries returns what is in dir.
func (t *nameTree) entries(dir *memNode) map[string]*memNode {
	if changed, ok := t.changed[dir]; ok {
		return changed
	}
	return dir.synced
}

func (t *nameTree) edit(dir *memNode) map[string]*memNode {
	if t.changed[dir] == nil {
		t.changed[dir] = maps.Clone(dir.synced)
	}
	return t.changed[dir]
}

// apply makes a change, if what it builds on is there.
func (t *nameTree) apply(ch nameChange) (applied bool) {
	if ch.from.dir != nil && t.entries(ch.from.dir)[ch.from.name] != ch.node {
		return false
	}
	if ch.isRemoval() {
		if len(t.entries(ch.node)) > 0 {
			return false
		}
	} else if there := t.entries(ch.to.dir)[ch.to.name]; there != nil && there != ch.replaced {
		return false
	}
	if ch.isMove() && (!t.has(t.root, ch.to.dir) || t.has(ch.node, ch.to.dir)) {
		return false // it would vanish from the tree
	}
	if ch.from.dir != nil {
		delete(t.edit(ch.from.dir), ch.from.name)
	}
	if ch.to.dir != nil {
		t.edit(ch.to.dir)[ch.to.name] = ch.node
	}
	return true
}

// has reports whether sought is top or anywhere below it.
func (t *nameTree) has(top, sought *memNode) bool {
	if top == sought {
		return true
	}
	for _, child := range t.entries(top) {
		if child.data == nil && t.has(child, sought) {
			return true
		}
	}
	return false
}

// namesAfterCrash chooses which changes a crash leaves.
func (m *Mem) namesAfterCrash(r *rand.Rand, fate fate) *nameTree {
	t := &nameTree{root: m.root, changed: make(map[*memNode]map[string]*memNode)}
	for _, ch := range m.changes {
		if fate.keeps(r) {
			t.apply(ch)
		}
	}
	return t
}

// syncNames makes the changes in dir durable, and with them the earlier ones that they
// build on.
func (m *Mem) syncNames(dir *memNode) {
	basis := needs{
		nodes:   make(map[*memNode]bool),
		places:  make(map[place]bool),
		emptied: make(map[*memNode]bool),
		reached: make(map[*memNode]bool),
	}
	chosen := make([]bool, len(m.changes))
	for i, ch := range slices.Backward(m.changes) {
		if ch.in(dir) || basis.include(ch) {
			basis.add(ch)
			chosen[i] = true
		}
	}
	t := &nameTree{root: m.root, changed: make(map[*memNode]map[string]*memNode)}
	var rest []nameChange
	for i, ch := range m.changes {
		if !chosen[i] {
			rest = append(rest, ch)
		} else if !t.apply(ch) {
			panic("vfs: a synced change of " + ch.from.name + " to " + ch.to.name + " builds on one that was left out")
		}
	}
	for dir, entries := range t.changed {
		dir.synced = entries
	}
	m.changes = rest
}

// needs is what a set of changes builds on, seen backwards in time.
type needs struct {
	nodes   map[*memNode]bool // what was moved must have got to where it was
	places  map[place]bool    // what was there must have gone
	emptied map[*memNode]bool // a directory removed must have become empty
	reached map[*memNode]bool // directories around a place moved to must have got there
}

// include reports whether one of the changes builds on ch.
func (n needs) include(ch nameChange) bool {
	return n.nodes[ch.node] || n.places[ch.from] || n.places[ch.to] ||
		n.emptied[ch.from.dir] || n.emptied[ch.to.dir] || n.reached[ch.node]
}

// add puts ch into the set.
func (n needs) add(ch nameChange) {
	n.nodes[ch.node] = true
	for _, p := range []place{ch.from, ch.to} {
		if p.dir != nil {
			n.places[p] = true
		}
	}
	if ch.isRemoval() && ch.node.data == nil {
		n.emptied[ch.node] = true
	}
	for _, dir := range ch.above {
		n.reached[dir] = true
	}
}
