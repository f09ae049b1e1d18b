package store

import "path"

// Reach is what the process that serves a volume has to reach in the store, as names in
// it: it can be confined to that after Open and before Attach.
type Reach struct {
	Read  []string // files, and directories with what is in them
	List  []string // directories whose names, and those below, it looks up
	Write []string // directories in which it makes, changes and removes files
}

// Reach returns what serving a volume takes: its own directory, and for reading the layers
// it stands on in others'. Which layers those are does not change while it is attached.
func (s *Store) Reach(volume string) (Reach, error) {
	rec, err := s.readRecord(volume)
	if err != nil {
		return Reach{}, notFound(volume, err)
	}
	reach := Reach{
		Read: []string{identityFile},
		List: []string{"."},
		// A spare file becomes a record when the store is full.
		Write: []string{volumeDir(volume), spareDir},
	}
	for _, l := range rec.Layers {
		switch owner := ownerOf(l.File); owner {
		case volume:
		case "":
			// What else an image consists of, or stands on, lies where it does.
			reach.Read = append(reach.Read, path.Dir(l.File))
		default:
			reach.Read = append(append(reach.Read, l.File), s.extentFiles(owner, l.File)...)
		}
	}
	return reach, nil
}
