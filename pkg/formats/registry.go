package formats

import (
	"fmt"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// registered is filled by Register: the one place that names all formats is package
// formats/all, so that a format can be tested without the others.
var registered []Format

// Register adds formats, in the order in which they are probed. It is called once, by
// package all, before anything else here.
func Register(formats ...Format) { registered = append(registered, formats...) }

// All returns the registered formats in the order in which they are probed.
func All() []Format { return registered }

// Lookup returns the format with a name; block.ErrInvalid if there is none.
func Lookup(name string) (Format, error) {
	var names []string
	for _, f := range registered {
		if f.Name() == name {
			return f, nil
		}
		names = append(names, f.Name())
	}
	return nil, fmt.Errorf("format %q: %w: want one of %s", name, block.ErrInvalid, strings.Join(names, ", "))
}
