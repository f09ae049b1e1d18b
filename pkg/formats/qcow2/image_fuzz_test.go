package qcow2_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
)

func FuzzImage(f *testing.F) { formattest.Fuzz(f, factories()...) }
