package driver

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Name is the driver's name, as in CSIDriver, StorageClass.provisioner and
// PersistentVolume.spec.csi.driver.
const Name = "csi.imgdisk.dev"

// DefaultMaxVolumes is a reasonable NodeConfig.MaxVolumes: each volume is a process.
const DefaultMaxVolumes = 128

// Config says what a driver serves. At least one of Controller and Node is set; both
// for a driver on one machine.
type Config struct {
	Version    string // of the driver; required
	Controller *ControllerConfig
	Node       *NodeConfig
}

// ControllerConfig is what the Controller service needs.
type ControllerConfig struct {
	// Stores by name: 1 to 32 of a-z, 0-9, "-", "." and "_", beginning with a letter
	// or digit. At least one.
	Stores map[string]Store
	// Formats are what the parameter "format" may name; the first is the default.
	Formats []Format
	// Nodes are the ids that volumes can be published to; nil: any.
	Nodes []string
}

// NodeConfig is what the Node service needs.
type NodeConfig struct {
	ID string // of the node; at most 128 bytes
	// MaxVolumes is how many volumes the node takes; 0: no limit is told.
	MaxVolumes int64
	Attacher   Attacher
	Mounter    Mounter
}

// Driver serves CSI. Make one with New.
type Driver struct {
	server   *grpc.Server
	services []string
}

// New returns a driver. block.ErrInvalid: the configuration makes no sense.
func New(cfg Config) (*Driver, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	d := &Driver{server: newGRPCServer()}
	csi.RegisterIdentityServer(d.server, &identity{cfg: cfg})
	if cfg.Controller != nil {
		csi.RegisterControllerServer(d.server, newController(*cfg.Controller))
		d.services = append(d.services, "controller")
	}
	if cfg.Node != nil {
		csi.RegisterNodeServer(d.server, newNode(*cfg.Node))
		d.services = append(d.services, "node")
	}
	return d, nil
}

func (c Config) validate() error {
	if c.Version == "" {
		return fmt.Errorf("driver: no version: %w", block.ErrInvalid)
	}
	if c.Controller == nil && c.Node == nil {
		return fmt.Errorf("driver: neither controller nor node: %w", block.ErrInvalid)
	}
	if c.Controller != nil {
		if err := c.Controller.validate(); err != nil {
			return err
		}
	}
	if c.Node != nil {
		return c.Node.validate()
	}
	return nil
}

func (c ControllerConfig) validate() error {
	if len(c.Stores) == 0 {
		return fmt.Errorf("controller: no stores: %w", block.ErrInvalid)
	}
	for name, store := range c.Stores {
		if err := ValidateStoreName(name); err != nil {
			return err
		}
		if store == nil {
			return fmt.Errorf("controller: store %q is nil: %w", name, block.ErrInvalid)
		}
	}
	if len(c.Formats) == 0 {
		return fmt.Errorf("controller: no formats: %w", block.ErrInvalid)
	}
	return nil
}

func (c NodeConfig) validate() error {
	if c.ID == "" || len(c.ID) > maxFieldBytes {
		return fmt.Errorf("node id %q: want 1 to %d bytes: %w", c.ID, maxFieldBytes, block.ErrInvalid)
	}
	if c.MaxVolumes < 0 {
		return fmt.Errorf("node: at most %d volumes: want 0 or more: %w", c.MaxVolumes, block.ErrInvalid)
	}
	if c.Attacher == nil || c.Mounter == nil {
		return fmt.Errorf("node: no attacher or no mounter: %w", block.ErrInvalid)
	}
	return nil
}

// storeNames lists the configured stores for people.
func storeNames(stores map[string]Store) string {
	return strings.Join(slices.Sorted(maps.Keys(stores)), ", ")
}
