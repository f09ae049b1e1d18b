package formattest

import (
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// checkWithQEMU has qemu-img check the images of a chain that is not open, and compare
// what it reads with want. Leaks are allowed where our own check allows them.
func (r *rig) checkWithQEMU(t testing.TB, want []byte, leaksAllowed bool) {
	t.Helper()
	r.askQEMU(t, want, oracle{leaksAllowed: leaksAllowed})
}

// checkLeftWithQEMU is checkWithQEMU for images that somebody who had been killed left, and
// nobody has changed since.
func (r *rig) checkLeftWithQEMU(t testing.TB, want []byte) {
	t.Helper()
	r.askQEMU(t, want, oracle{leaksAllowed: true, crashed: true})
}

func (r *rig) askQEMU(t testing.TB, want []byte, o oracle) {
	t.Helper()
	if r.f.QEMU == "" {
		return
	}
	o.f, o.qemuImg, o.dir = r.f, testenv.Oracle(t, "qemu-img"), t.TempDir()
	if err := o.look(r, want); err != nil {
		t.Error(err)
	}
}

// oracle is qemu-img's opinion about images.
type oracle struct {
	f            Factory
	qemuImg      string
	dir          string // empty; for copies
	leaksAllowed bool
	crashed      bool // a crash left the images
}

// look returns an error unless qemu-img finds nothing wrong with a chain that is not open,
// and reads want.
func (o *oracle) look(r *rig, want []byte) error {
	if err := export(r.fs, ".", o.dir); err != nil {
		return fmt.Errorf("export: %w", err)
	}
	for i := range r.names {
		if err := o.check(r.names[:i+1]); err != nil {
			return err
		}
	}
	r.figures().OracleChecks.Add(int64(len(r.names)))
	raw := filepath.Join(o.dir, "want.raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		return err
	}
	if err := o.compare(r, raw); err != nil {
		return err
	}
	r.figures().OracleCompares.Add(1)
	return nil
}

// compare has qemu-img compare a chain with a raw file.
func (o *oracle) compare(r *rig, raw string) error {
	args := []string{"compare"}
	if o.f.Secret == nil {
		args = append(args, "-f", o.f.qemuOf(r.top()), "-F", "raw", filepath.Join(o.dir, r.top()), raw)
	} else {
		options, err := o.encrypted(r.names)
		if err != nil {
			return err
		}
		args = append(args, options...)
		args = append(args, "driver=raw,file.filename="+raw)
	}
	out, err := exec.Command(o.qemuImg, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img compare %s: %w\n%s", r.top(), err, out)
	}
	return nil
}

// encrypted returns how qemu-img opens a chain of encrypted images.
func (o *oracle) encrypted(names []string) ([]string, error) {
	top := names[len(names)-1]
	password, err := o.f.Secret(top)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(o.dir, "secret")
	if err := os.WriteFile(file, password, 0o600); err != nil {
		return nil, err
	}
	options := "driver=" + o.f.QEMU + ",file.filename=" + filepath.Join(o.dir, top)
	layer := ""
	for _, name := range slices.Backward(names) {
		if o.f.formatOf(name) == o.f.Format {
			options += fmt.Sprintf(",%sencrypt.format=%s,%sencrypt.key-secret=sec0", layer, o.f.QEMUCrypt, layer)
		}
		layer += "backing."
	}
	return []string{"--object", "secret,id=sec0,file=" + file, "--image-opts", options}, nil
}

// Exit codes of qemu-img check.
const (
	qemuCheckLeaks       = 3
	qemuCheckUnsupported = 63 // for formats that it has no check for
)

// check has qemu-img check the top of a chain.
func (o *oracle) check(names []string) error {
	name := names[len(names)-1]
	format, own := o.f.qemuOf(name), o.f.formatOf(name) == o.f.Format
	if format == "" {
		return nil
	}
	file := filepath.Join(o.dir, name)
	if o.crashed && o.f.BeforeOracle != nil && own {
		if err := o.f.BeforeOracle(o.qemuImg, file); err != nil {
			return err
		}
	}
	args := []string{"check", "-f", format, file}
	if o.f.Secret != nil && own {
		options, err := o.encrypted(names)
		if err != nil {
			return err
		}
		args = append([]string{"check"}, options...)
	}
	out, err := exec.Command(o.qemuImg, args...).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		switch code := exit.ExitCode(); {
		case code == qemuCheckUnsupported, code == qemuCheckLeaks && o.leaksAllowed:
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("qemu-img check %s: %w\n%s", name, err, out)
	}
	return nil
}

// ReplayLog has qemu-img bring an image up to date that a crash left with a log: it does
// so only where it may write. For Factory.BeforeOracle.
func ReplayLog(format string) func(qemuImg, file string) error {
	return func(qemuImg, file string) error {
		out, err := exec.Command(qemuImg, "check", "-f", format, "-r", "all", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("qemu-img check -r all %s: %w\n%s", filepath.Base(file), err, out)
		}
		return nil
	}
}

// sampleSize is how many of the images that the crashes of one sweep leave the oracle looks at.
// fullVariable, when set, has it look at all, and error sweeps fail every operation.
const (
	sampleSize   = 5
	fullVariable = "IMGDISK_FULL"
)

// crashSample is a random sample of images that crashes left, for the oracle to look at:
// each of those seen has the same chance to be in it.
type crashSample struct {
	t      testing.TB
	r      *rand.Rand
	most   int
	seen   int
	images []crashImage
}

// crashImage is what a crash left, untouched by us, and what we found in it.
type crashImage struct {
	what string
	rig  *rig
	want []byte
}

func newCrashSample(t testing.TB, f Factory, r *rand.Rand) *crashSample {
	s := &crashSample{t: t, r: rand.New(rand.NewPCG(r.Uint64(), r.Uint64())), most: sampleSize}
	switch {
	case f.QEMU == "":
		s.most = 0
	case os.Getenv(fullVariable) != "":
		s.most = math.MaxInt
	case testing.Short():
		s.most = 1
	}
	return s
}

// add adds an image to the sample, or does not. what describes the crash.
func (s *crashSample) add(what string, rig *rig, want []byte) {
	s.seen++
	if len(s.images) < s.most {
		s.images = append(s.images, crashImage{what, rig, want})
	} else if i := s.r.IntN(s.seen); i < s.most {
		s.images[i] = crashImage{what, rig, want}
	}
}

// check has the oracle look at the sample.
func (s *crashSample) check() {
	s.t.Helper()
	if len(s.images) == 0 {
		return
	}
	qemuImg := testenv.Oracle(s.t, "qemu-img")
	for _, image := range s.images {
		if err := image.check(qemuImg); err != nil {
			s.t.Errorf("%s: %v", image.what, err)
			return
		}
		image.rig.figures().OracleCrashes.Add(1)
	}
}

func (i crashImage) check(qemuImg string) error {
	dir, err := os.MkdirTemp("", "formattest")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	o := oracle{f: i.rig.f, qemuImg: qemuImg, dir: dir, leaksAllowed: true, crashed: true}
	return o.look(i.rig, i.want)
}

// export copies the files in a directory of fsys to a directory of the host.
func export(fsys vfs.FS, dir, to string) error {
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, host := path.Join(dir, e.Name()), filepath.Join(to, e.Name())
		if e.IsDir() {
			err = errors.Join(os.Mkdir(host, 0o700), export(fsys, name, host))
		} else {
			err = exportFile(fsys, name, host)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func exportFile(fsys vfs.FS, name, host string) error {
	from, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.Create(host)
	if err != nil {
		return err
	}
	err = copySparse(from, to)
	return errors.Join(err, to.Close())
}

// copySparse copies data and leaves holes.
func copySparse(from vfs.File, to *os.File) error {
	size, err := from.Size()
	if err != nil {
		return err
	}
	if err := to.Truncate(size); err != nil {
		return err
	}
	for off := int64(0); ; {
		start, end, err := from.NextData(off)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(to, start), io.NewSectionReader(from, start, end-start)); err != nil {
			return err
		}
		off = end
	}
}
