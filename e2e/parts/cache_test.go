package parts

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func openTestCache(t *testing.T, dir string) *cache {
	t.Helper()
	c, err := openCache(t.Context(), dir, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// writeFile is what tests have a part made of.
func writeFile(made *int) func(context.Context, string) error {
	return func(_ context.Context, dir string) error {
		*made++
		return os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o644)
	}
}

func TestCache_MakesOnce(t *testing.T) {
	c := openTestCache(t, t.TempDir())
	made := 0
	var paths []string
	for _, version := range []string{"1", "1", "2", "1"} {
		path, err := c.get(t.Context(), "part", newKey().text(version), writeFile(&made))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(path, "file")); err != nil {
			t.Error(err)
		}
		paths = append(paths, path)
	}
	if made != 2 || paths[0] != paths[1] || paths[0] == paths[2] || paths[0] != paths[3] {
		t.Errorf("made %d times: %q", made, paths)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
}

func TestCache_NothingIsLeftOfAFailure(t *testing.T) {
	dir := t.TempDir()
	c := openTestCache(t, dir)
	failure := errors.New("no space")
	_, err := c.get(t.Context(), "part", newKey(), func(_ context.Context, dir string) error {
		return errors.Join(os.WriteFile(filepath.Join(dir, "file"), nil, 0o644), failure)
	})
	if !errors.Is(err, failure) {
		t.Errorf("the error is %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "part*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	made := 0
	if _, err := c.get(t.Context(), "part", newKey(), writeFile(&made)); err != nil || made != 1 {
		t.Errorf("the next time: made %d times, %v", made, err)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
}

func TestCache_KeyOfAMissingFile(t *testing.T) {
	c := openTestCache(t, t.TempDir())
	made := 0
	_, err := c.get(t.Context(), "part", newKey().files("/does/not/exist"), writeFile(&made))
	if err == nil || made != 0 || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("made %d times: %v", made, err)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
}

func TestCache_RemovesWhatIsOld(t *testing.T) {
	dir := t.TempDir()
	c := openTestCache(t, dir)
	made := 0
	old, err := c.get(t.Context(), "part", newKey().text("old"), writeFile(&made))
	if err != nil {
		t.Fatal(err)
	}
	fresh, err := c.get(t.Context(), "part", newKey().text("new"), writeFile(&made))
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now().Add(-keptFor - time.Hour)
	killed, foreign := filepath.Join(dir, "part"+unfinished+"1"), filepath.Join(dir, "machines")
	err = errors.Join(os.Mkdir(killed, 0o755), os.Mkdir(foreign, 0o755), os.Chtimes(old, before, before), os.Chtimes(foreign, before, before))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{old: false, killed: false, fresh: true, foreign: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: want it there %v; %v", path, want, err)
		}
	}
}

func TestCache_WaitsForAnother(t *testing.T) {
	dir := t.TempDir()
	first := openTestCache(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := openCache(ctx, dir, t.Output()); !errors.Is(err, context.Canceled) {
		t.Errorf("while another has it: %v", err)
	}
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	if err := openTestCache(t, dir).close(); err != nil {
		t.Error(err)
	}
}

func TestKey_Sources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
		return newKey().sources(dir).sum()
	}
	first := write("a/a.go", "package a")
	if write("a/a_test.go", "package a") != first || write("a/testdata/x.go", "package x") != first {
		t.Error("tests are part of the key")
	}
	if write("a/a.go", "package b") == first {
		t.Error("contents are not part of the key")
	}
	if write("a/a.go", "package a") != first {
		t.Error("the key of the same files differs")
	}
	if write("a/data.txt", "x") == first {
		t.Error("files that are not Go's are not part of the key")
	}
}
