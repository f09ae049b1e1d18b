package formattest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/internal/testenv"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/vfs"
)

// checkWithQEMU has qemu-img check the images of a chain that is not open, and compare
// what it reads with want.
func (r *rig) checkWithQEMU(t testing.TB, want []byte) {
	t.Helper()
	if r.f.QEMU == "" {
		return
	}
	qemuImg := testenv.Oracle(t, "qemu-img")
	dir := t.TempDir()
	if err := export(r.fs, ".", dir); err != nil {
		t.Fatalf("export: %v", err)
	}
	for _, name := range r.names {
		if err := qemuCheck(qemuImg, r.f.QEMU, filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	raw := filepath.Join(dir, "want.raw")
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	top := filepath.Join(dir, r.top())
	out, err := exec.Command(qemuImg, "compare", "-f", r.f.QEMU, "-F", "raw", top, raw).CombinedOutput()
	if err != nil {
		t.Errorf("qemu-img compare %s: %v\n%s", r.top(), err, out)
	}
}

// qemuCheckUnsupported is the exit code of qemu-img check for formats it has no check for.
const qemuCheckUnsupported = 63

func qemuCheck(qemuImg, format, file string) error {
	out, err := exec.Command(qemuImg, "check", "-f", format, file).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == qemuCheckUnsupported {
		return nil
	}
	if err != nil {
		return fmt.Errorf("qemu-img check %s: %w\n%s", filepath.Base(file), err, out)
	}
	return nil
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
