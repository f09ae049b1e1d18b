package engine

import (
	"errors"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// errFormatFull: the image cannot grow further whatever space the store has; to whoever
// writes it is the same as a full store.
var errFormatFull = block.ErrNoSpace

// errGranulesChanged: what a granule is has changed since it was asked, before the range
// was claimed (a block became present as a whole, or sector by sector). Nothing was done.
var errGranulesChanged = errors.New("granules have changed meanwhile")
