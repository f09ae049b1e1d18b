package main

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
)

// module is this repository's.
const module = "github.com/csi-imgdisk/csi-imgdisk/"

// imageTarget is what a fuzz target is called that opens, reads and writes whole images.
var imageTarget = regexp.MustCompile(`(?m)^func (FuzzImage|FuzzOpenReadWrite|FuzzOpen)\(`)

// Every registered format has a fuzz target that opens an image, reads and writes it.
func TestFormatsAreFuzzed(t *testing.T) {
	for _, f := range formats.All() {
		dir := strings.TrimPrefix(reflect.TypeOf(f).PkgPath(), module)
		files, err := filepath.Glob(filepath.Join("..", "..", dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			found = found || imageTarget.Match(b)
		}
		if !found {
			t.Errorf("format %s has no FuzzImage in %s: want func FuzzImage(f *testing.F) { formattest.Fuzz(f, …) }", f.Name(), dir)
		}
	}
}
