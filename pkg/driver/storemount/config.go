package storemount

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

// Store says where a store is: exactly one of Path, NFS and SMB is set.
type Store struct {
	// Name is what StorageClasses and volume handles call it; see driver.ControllerConfig.
	Name string `json:"name"`
	// Path is the absolute path of a directory that somebody else mounts.
	Path string `json:"path,omitempty"`
	NFS  *NFS   `json:"nfs,omitempty"`
	SMB  *SMB   `json:"smb,omitempty"`
	// Init has the controller make a store of the directory if it is none yet.
	Init bool `json:"init,omitempty"`
}

// NFS is an export of an NFS server.
type NFS struct {
	Server string `json:"server"` // name or address
	Path   string `json:"path"`   // absolute, on the server
	// MountOptions are those of mount.nfs; without a version, 4 is asked for, whose
	// locks need no other daemon.
	MountOptions []string `json:"mountOptions,omitempty"`
}

// SMB is a share of an SMB server.
type SMB struct {
	Source string `json:"source"` // "//server/share", and a directory in it
	// MountOptions are those of mount.cifs; passwords belong into CredentialsDir.
	MountOptions []string `json:"mountOptions,omitempty"`
	// CredentialsDir has the files username, password and, if need be, domain, as a
	// mounted Secret has them; "": a guest.
	CredentialsDir string `json:"credentialsDir,omitempty"`
}

// maxConfigBytes bounds a configuration file.
const maxConfigBytes = 1 << 20

// ReadConfig returns the stores that a JSON file declares: {"stores": [Store, …]}.
// block.ErrInvalid: what it says makes no sense.
func ReadConfig(path string) ([]Store, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read stores: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read stores: %w", err)
	}
	if len(data) > maxConfigBytes {
		return nil, fmt.Errorf("read stores: %s has more than %d bytes: %w", path, maxConfigBytes, block.ErrInvalid)
	}
	stores, err := parseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("stores in %s: %w", path, err)
	}
	return stores, nil
}

func parseConfig(data []byte) ([]Store, error) {
	var config struct {
		Stores []Store `json:"stores"`
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&config); err != nil {
		return nil, fmt.Errorf("%w: %w", block.ErrInvalid, err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: something follows the object", block.ErrInvalid)
	}
	return config.Stores, Validate(config.Stores)
}

// Validate checks stores together. block.ErrInvalid: there is none, two have one name, or
// one makes no sense.
func Validate(stores []Store) error {
	if len(stores) == 0 {
		return fmt.Errorf("there is no store: %w: want one at least", block.ErrInvalid)
	}
	seen := map[string]bool{}
	for _, s := range stores {
		if seen[s.Name] {
			return fmt.Errorf("store %s: %w: two have this name", s.Name, block.ErrInvalid)
		}
		seen[s.Name] = true
		if err := s.validate(); err != nil {
			return fmt.Errorf("store %s: %w", s.Name, err)
		}
	}
	return nil
}

func (s Store) validate() error {
	if err := driver.ValidateStoreName(s.Name); err != nil {
		return err
	}
	kinds := 0
	for _, set := range []bool{s.Path != "", s.NFS != nil, s.SMB != nil} {
		if set {
			kinds++
		}
	}
	switch {
	case kinds != 1:
		return fmt.Errorf("%w: want exactly one of path, nfs and smb", block.ErrInvalid)
	case s.NFS != nil:
		return s.NFS.validate()
	case s.SMB != nil:
		return s.SMB.validate()
	case !filepath.IsAbs(s.Path) || filepath.Clean(s.Path) == "/":
		return invalid("path", s.Path, "an absolute path below the root")
	}
	return nil
}

func (n NFS) validate() error {
	if n.Server == "" || strings.HasPrefix(n.Server, "-") || strings.ContainsAny(n.Server, " \t\n/,") {
		return invalid("nfs.server", n.Server, "a host name or address")
	}
	if !strings.HasPrefix(n.Path, "/") || strings.ContainsAny(n.Path, "\n\x00") {
		return invalid("nfs.path", n.Path, "an absolute path on the server")
	}
	return checkOptions("nfs.mountOptions", n.MountOptions, func(option string) string {
		name, value, _ := strings.Cut(option, "=")
		if name == "nolock" || name == "local_lock" && value != "none" {
			return "the server to know the locks that keep two nodes from writing one volume"
		}
		return ""
	})
}

func (m SMB) validate() error {
	server, share, _ := strings.Cut(strings.TrimPrefix(m.Source, "//"), "/")
	if !strings.HasPrefix(m.Source, "//") || server == "" || share == "" || strings.ContainsAny(m.Source, "\n\x00") {
		return invalid("smb.source", m.Source, "//server/share")
	}
	if m.CredentialsDir != "" && !filepath.IsAbs(m.CredentialsDir) {
		return invalid("smb.credentialsDir", m.CredentialsDir, "an absolute path")
	}
	return checkOptions("smb.mountOptions", m.MountOptions, func(option string) string {
		switch name, _, _ := strings.Cut(option, "="); name {
		case "nobrl":
			return "the server to know the locks that keep two nodes from writing one volume"
		case "password", "pass", "credentials", "cred":
			return "no password here: it belongs into smb.credentialsDir"
		}
		return ""
	})
}

// checkOptions checks mount options; want says what to have instead of one that is refused.
func checkOptions(field string, options []string, want func(string) string) error {
	for _, listed := range options {
		for option := range strings.SplitSeq(listed, ",") {
			if option == "" || strings.ContainsAny(option, " \t\n\x00") {
				return invalid(field, listed, "options without blanks, one each")
			}
			if instead := want(option); instead != "" {
				name, _, _ := strings.Cut(option, "=") // the value may be a secret
				return invalid(field, name, instead)
			}
		}
	}
	return nil
}

func invalid(field, value, want string) error {
	return fmt.Errorf("%s %q: %w: want %s", field, value, block.ErrInvalid, want)
}
