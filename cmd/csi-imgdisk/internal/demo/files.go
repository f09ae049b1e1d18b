package demo

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// letterFile and sumsFile are in the sample: see sample/make.sh.
const (
	letterFile = "letter.txt"
	sumsFile   = "sums.txt"
)

// readSample checks the sums of the sample's files and returns the letter.
func readSample(dir string) (string, error) {
	sums, err := os.ReadFile(filepath.Join(dir, sumsFile))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(sums)) {
		fields := strings.Fields(line)
		if len(fields) != 2 {
			return "", fmt.Errorf("%s: line %q is no sum and name", sumsFile, line)
		}
		got, err := sumFile(filepath.Join(dir, filepath.Base(fields[1])))
		if err != nil {
			return "", err
		}
		if got != fields[0] {
			return "", fmt.Errorf("the contents of %s are wrong", fields[1])
		}
	}
	letter, err := os.ReadFile(filepath.Join(dir, letterFile))
	return string(letter), err
}

func sumFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// writeRandom writes a new file of random bytes, durably, in place of an older one, and
// returns its sum.
func writeRandom(path string, bytes int64) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	_, err = io.CopyN(io.MultiWriter(f, h), rand.Reader, bytes)
	err = errors.Join(err, f.Sync(), f.Close())
	return hex.EncodeToString(h.Sum(nil)), err
}

// maxSearched bounds how many names are looked at for a file to read.
const maxSearched = 10000

// readSomeFile reads the first ordinary file it finds and describes it.
func readSomeFile(dir string) (string, error) {
	var found string
	searched := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		searched++
		if err != nil || searched > maxSearched {
			return fs.SkipAll
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
			found = path
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if found == "" {
		return "there is no file in it", nil
	}
	sum, err := sumFile(found)
	if err != nil {
		return "", err
	}
	name, err := filepath.Rel(dir, found)
	return fmt.Sprintf("/%s, sha256 %s…", name, sum[:16]), err
}

// df returns the size of, and the space left on, the file system at path.
func df(path string) (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Blocks) * st.Bsize, int64(st.Bavail) * st.Bsize, nil
}

// growableFileSystem is ext4, or xfs where the kernel would not let this process make a
// mounted ext4 larger: that needs a capability that root in a container may lack.
func growableFileSystem() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return "xfs"
	}
	return "ext4"
}
