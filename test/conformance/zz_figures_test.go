package main

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
)

// TestZ_Figures is the last test here: it writes what the others have counted.
func TestZ_Figures(t *testing.T) { formattest.WriteFigures(t) }
