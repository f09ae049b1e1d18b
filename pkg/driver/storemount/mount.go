package storemount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	mount "k8s.io/mount-utils"
)

// Mounts mounts stores below a directory.
type Mounts struct {
	dir     string // each store's mount point is in it
	mounter mount.Interface
}

// New returns what mounts stores below dir, which is made when it is needed. Mounts are
// this process's mount namespace's.
func New(dir string) *Mounts { return &Mounts{dir, mount.NewWithoutSystemd("")} }

// Root returns the directory that a store is in, or is going to be once it is mounted.
func (m *Mounts) Root(s Store) string {
	if s.Path != "" {
		return filepath.Clean(s.Path)
	}
	return filepath.Join(m.dir, s.Name)
}

// Mount mounts a store if it is one to be mounted and is not yet. It may take minutes when
// a server does not answer. An error says in one line why it cannot be mounted.
func (m *Mounts) Mount(s Store) error {
	if s.Path != "" {
		return nil
	}
	root := m.Root(s)
	// Nobody but root shall write below, should it not be mounted.
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("make the mount point: %w", err)
	}
	mounted, err := m.mounter.IsMountPoint(root)
	if err != nil {
		return fmt.Errorf("is %s mounted: %w", root, err)
	}
	if mounted {
		return nil
	}
	if s.NFS != nil {
		return m.mountNFS(*s.NFS, root)
	}
	return m.mountSMB(*s.SMB, root)
}

func (m *Mounts) mountNFS(n NFS, root string) error {
	server := n.Server
	if strings.Contains(server, ":") && !strings.HasPrefix(server, "[") {
		server = "[" + server + "]" // an IPv6 address
	}
	source := server + ":" + n.Path
	options := n.MountOptions
	if !hasVersion(options) {
		options = append([]string{"nfsvers=4"}, options...)
	}
	return explain(source, m.mounter.Mount(source, root, "nfs", options))
}

func hasVersion(options []string) bool {
	for option := range strings.SplitSeq(strings.Join(options, ","), ",") {
		name, _, _ := strings.Cut(option, "=")
		if name == "vers" || name == "nfsvers" || strings.HasPrefix(name, "v4") || name == "v3" {
			return true
		}
	}
	return false
}

func (m *Mounts) mountSMB(s SMB, root string) error {
	options := s.MountOptions
	if s.CredentialsDir == "" {
		return explain(s.Source, m.mounter.Mount(s.Source, root, "cifs", append([]string{"guest"}, options...)))
	}
	file, err := credentialsFile(s.CredentialsDir, m.dir)
	if err != nil {
		return fmt.Errorf("mount %s: %w", s.Source, err)
	}
	defer os.Remove(file)
	return explain(s.Source, m.mounter.MountSensitive(s.Source, root, "cifs", options, []string{"credentials=" + file}))
}

// maxCredentialBytes bounds a user name or a password.
const maxCredentialBytes = 4096

// credentialsFile makes, in a directory, the file that mount.cifs reads credentials from.
// On a command line all processes could see them.
func credentialsFile(from, in string) (path string, err error) {
	var text strings.Builder
	for _, key := range []string{"username", "password", "domain"} {
		data, err := os.ReadFile(filepath.Join(from, key))
		if errors.Is(err, fs.ErrNotExist) && key == "domain" {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("credentials: %w", err)
		}
		value := strings.TrimRight(string(data), "\r\n")
		if len(value) > maxCredentialBytes || strings.ContainsAny(value, "\n\x00") {
			return "", fmt.Errorf("credentials: %s is longer than %d bytes or has several lines", key, maxCredentialBytes)
		}
		fmt.Fprintf(&text, "%s=%s\n", key, value)
	}
	f, err := os.CreateTemp(in, ".credentials-") // mode 0600
	if err != nil {
		return "", fmt.Errorf("credentials: %w", err)
	}
	_, err = f.WriteString(text.String())
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", fmt.Errorf("credentials: %w", err)
	}
	return f.Name(), nil
}

// explain makes one line of what mount said: mount-utils puts the command beside it, over
// several lines.
func explain(source string, err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if _, output, ok := strings.Cut(text, "Output: "); ok && strings.TrimSpace(output) != "" {
		text = output
	}
	var said []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" {
			said = append(said, line)
		}
	}
	return fmt.Errorf("mount %s: %s", source, strings.Join(said, "; "))
}
