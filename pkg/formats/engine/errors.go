package engine

import "github.com/csi-imgdisk/csi-imgdisk/pkg/block"

// errFormatFull: the image cannot grow further whatever space the store has; to whoever
// writes it is the same as a full store.
var errFormatFull = block.ErrNoSpace
