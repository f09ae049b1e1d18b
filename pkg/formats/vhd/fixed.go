package vhd

import (
	"errors"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/engine"
)

// beginFixed writes the footer with another time where it is. What follows it is a rest of
// an enlargement that a crash ended: zeroes.
func (m *image) beginFixed(c *engine.Commit, f footer) error {
	if end := m.footerOff + footerBytes; m.fileBytes > end {
		if err := c.Truncate(0, end); err != nil {
			return err
		}
		if err := c.Sync(); err != nil {
			return err
		}
	}
	if err := m.writeFixedFooter(c, f); err != nil {
		return err
	}
	m.lost = lostFooter{}
	return nil
}

// writeFixedFooter replaces the footer where it is, durably.
func (m *image) writeFixedFooter(c *engine.Commit, f footer) error {
	f.seal()
	if err := m.replaceSector(c, m.footer[:], f[:], m.footerOff); err != nil {
		return err
	}
	m.footer, m.fileBytes = f, m.footerOff+footerBytes
	return nil
}

// addFooter writes a copy of the footer at another place, durably: farther on, where it
// ends the file.
func (m *image) addFooter(c *engine.Commit, off int64) error {
	err := writeSynced(c, m.footer[:], off)
	if err == nil {
		m.footerOff, m.fileBytes = off, off+footerBytes
		return nil
	}
	if back := c.Truncate(0, m.footerOff+footerBytes); back != nil {
		m.uncertain = errors.Join(err, back)
	}
	return err
}

// resizeFixed moves the footer. There is only one, and what is before it is the guest's,
// so at every moment the file has to end with a footer, and the old one's place must not
// be visible before it is zero: first a footer with the smaller size is at both places.
func (m *image) resizeFixed(c *engine.Commit, size int64) error {
	if m.uncertain != nil {
		return m.uncertain
	}
	f := m.footer
	f.setSize(size)
	if size > m.sizeBytes {
		return m.growFixed(c, f, size)
	}
	if err := m.writeFixedFooter(c, f); err != nil {
		return err
	}
	m.sizeBytes = size
	if err := writeSynced(c, m.footer[:], size); err != nil {
		return err
	}
	// Whatever a loss of power leaves of what is cut off, this footer is found before it.
	if cut := size + footerBytes; cut < m.footerOff {
		if err := m.punchOrWrite(c, cut, m.footerOff-cut); err != nil {
			return err
		}
		if err := m.f.Sync(); err != nil {
			return err
		}
	}
	if err := c.Truncate(0, size+footerBytes); err != nil {
		return err
	}
	m.footerOff, m.fileBytes = size, size+footerBytes
	return nil
}

func (m *image) growFixed(c *engine.Commit, f footer, size int64) error {
	// What lies between the guest's end and a footer farther on is of no program.
	if err := m.zeroRange(c, m.sizeBytes, min(size, m.footerOff)); err != nil {
		return err
	}
	if old := m.footerOff; size > old {
		if err := m.addFooter(c, size); err != nil {
			return err
		}
		if err := c.WriteAt(0, make([]byte, min(footerBytes, size-old)), old); err != nil {
			return err
		}
	}
	if err := c.Sync(); err != nil {
		return err
	}
	if err := m.writeFixedFooter(c, f); err != nil {
		return err
	}
	m.sizeBytes = size
	return nil
}
