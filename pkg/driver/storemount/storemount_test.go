package storemount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	mount "k8s.io/mount-utils"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

func TestReadConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stores.json")
	text := `{"stores": [
		{"name": "host", "path": "/srv/volumes", "init": true},
		{"name": "nas", "nfs": {"server": "10.0.0.1", "path": "/export", "mountOptions": ["nfsvers=4.1"]}},
		{"name": "win", "smb": {"source": "//files/vm disks", "credentialsDir": "/etc/smb"}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	want := []Store{
		{Name: "host", Path: "/srv/volumes", Init: true},
		{Name: "nas", NFS: &NFS{Server: "10.0.0.1", Path: "/export", MountOptions: []string{"nfsvers=4.1"}}},
		{Name: "win", SMB: &SMB{Source: "//files/vm disks", CredentialsDir: "/etc/smb"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stores (-want +got):\n%s", diff)
	}
}

func TestParseConfig_Refused(t *testing.T) {
	for _, test := range []struct{ name, stores, says string }{
		{"none", ``, "want one at least"},
		{"unknown field", `{"name": "a", "path": "/a", "colour": 1}`, "colour"},
		{"no place", `{"name": "a"}`, "exactly one of"},
		{"two places", `{"name": "a", "path": "/a", "nfs": {"server": "s", "path": "/x"}}`, "exactly one of"},
		{"one name twice", `{"name": "a", "path": "/a"}, {"name": "a", "path": "/b"}`, "two have this name"},
		{"bad name", `{"name": "A/b", "path": "/a"}`, `"A/b"`},
		{"relative path", `{"name": "a", "path": "srv"}`, "an absolute path"},
		{"the root", `{"name": "a", "path": "/"}`, "below the root"},
		{"option as server", `{"name": "a", "nfs": {"server": "-o", "path": "/x"}}`, "host name"},
		{"relative export", `{"name": "a", "nfs": {"server": "s", "path": "x"}}`, "absolute path on the server"},
		{"nolock", `{"name": "a", "nfs": {"server": "s", "path": "/x", "mountOptions": ["hard,nolock"]}}`, "two nodes"},
		{"local_lock", `{"name": "a", "nfs": {"server": "s", "path": "/x", "mountOptions": ["local_lock=all"]}}`, "two nodes"},
		{"nobrl", `{"name": "a", "smb": {"source": "//s/x", "mountOptions": ["nobrl"]}}`, "two nodes"},
		{"password", `{"name": "a", "smb": {"source": "//s/x", "mountOptions": ["password=secret"]}}`, "credentialsDir"},
		{"no share", `{"name": "a", "smb": {"source": "//s"}}`, "//server/share"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := parseConfig([]byte(`{"stores": [` + test.stores + `]}`))
			if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v, want block.ErrInvalid and %q", err, test.says)
			}
			if err != nil && strings.Contains(err.Error(), "secret") {
				t.Errorf("the error tells a password: %v", err)
			}
		})
	}
}

// spy is a mounter that remembers what credentials it was given.
type spy struct {
	*mount.FakeMounter
	credentials string
	fail        error
}

func (s *spy) Mount(source, target, fstype string, options []string) error {
	return s.MountSensitive(source, target, fstype, options, nil)
}

func (s *spy) MountSensitive(source, target, fstype string, options, sensitive []string) error {
	for _, option := range sensitive {
		data, err := os.ReadFile(strings.TrimPrefix(option, "credentials="))
		if err != nil {
			return err
		}
		s.credentials = string(data)
	}
	if s.fail != nil {
		return s.fail
	}
	return s.FakeMounter.Mount(source, target, fstype, options)
}

func TestMount(t *testing.T) {
	secret := t.TempDir()
	for key, value := range map[string]string{"username": "ann", "password": "p,w=1\n"} {
		if err := os.WriteFile(filepath.Join(secret, key), []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		store       Store
		device      string
		fstype      string
		options     []string
		credentials string
	}{
		{Store{Name: "a", NFS: &NFS{Server: "nas", Path: "/x"}}, "nas:/x", "nfs", []string{"nfsvers=4"}, ""},
		{Store{Name: "a", NFS: &NFS{Server: "fd00::1", Path: "/x", MountOptions: []string{"vers=4.1", "hard"}}}, "[fd00::1]:/x", "nfs", []string{"vers=4.1", "hard"}, ""},
		{Store{Name: "a", SMB: &SMB{Source: "//win/share", CredentialsDir: secret, MountOptions: []string{"vers=3.1.1"}}}, "//win/share", "cifs", []string{"vers=3.1.1"}, "username=ann\npassword=p,w=1\n"},
		{Store{Name: "a", SMB: &SMB{Source: "//win/share"}}, "//win/share", "cifs", []string{"guest"}, ""},
	} {
		dir := t.TempDir()
		s := &spy{FakeMounter: mount.NewFakeMounter(nil)}
		m := &Mounts{dir, s}
		for range 2 { // the second time there is nothing to do
			if err := m.Mount(test.store); err != nil {
				t.Fatal(err)
			}
		}
		want := []mount.MountPoint{{Device: test.device, Path: filepath.Join(dir, "a"), Type: test.fstype, Opts: test.options}}
		if diff := cmp.Diff(want, s.MountPoints); diff != "" {
			t.Errorf("mounts (-want +got):\n%s", diff)
		}
		if s.credentials != test.credentials {
			t.Errorf("credentials %q, want %q", s.credentials, test.credentials)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, ".cred*")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	}
}

func TestMount_SaysWhyInOneLine(t *testing.T) {
	s := &spy{FakeMounter: mount.NewFakeMounter(nil)}
	// As mount-utils says it.
	s.fail = fmt.Errorf("mount failed: exit status 32\nMounting command: mount\nMounting arguments: -t nfs nas:/x /a\nOutput: %s", "mount.nfs: Connection refused\n\n")
	err := (&Mounts{t.TempDir(), s}).Mount(Store{Name: "a", NFS: &NFS{Server: "nas", Path: "/x"}})
	if want := "mount nas:/x: mount.nfs: Connection refused"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestRoot(t *testing.T) {
	m := New("/run/stores")
	if got := m.Root(Store{Name: "a", Path: "/srv/x/"}); got != "/srv/x" {
		t.Errorf("root of a directory: %s", got)
	}
	if got := m.Root(Store{Name: "a", NFS: &NFS{}}); got != "/run/stores/a" {
		t.Errorf("root of an export: %s", got)
	}
}

func TestStatus(t *testing.T) {
	d := Status(filepath.Join(t.TempDir(), "stores"))
	if err := d.Get("a"); err != nil {
		t.Errorf("nothing said: %v", err)
	}
	if err := d.Set("a", nil); err != nil {
		t.Errorf("mounted, without anything before: %v", err)
	}
	if err := d.Set("a", errors.New("mount nas:/x: Connection refused")); err != nil {
		t.Fatal(err)
	}
	err := d.Get("a")
	if !errors.Is(err, driver.ErrUnavailable) || !strings.Contains(err.Error(), "Connection refused") {
		t.Errorf("not mounted: %v", err)
	}
	if err := d.Set("a", nil); err != nil {
		t.Fatal(err)
	}
	if err := d.Get("a"); err != nil {
		t.Errorf("mounted: %v", err)
	}
}
