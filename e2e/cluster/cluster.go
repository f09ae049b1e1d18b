package cluster

import (
	"context"
	"io"
	"path/filepath"

	"github.com/csi-imgdisk/csi-imgdisk/e2e/parts"
)

// What is at the same place in every cluster, because each has a network of its own.
const (
	// NFSAddress is the address of machine "nfs", as nodes and pods reach it.
	NFSAddress = "10.77.0.2"

	// ExportPath is the directory that machine "nfs" exports (rw,sync,no_root_squash) to
	// all of the cluster's network. It lies on a disk of its own, of ext4.
	ExportPath = "/export"
)

// Names of the machines.
const (
	NodeA = "node-a"
	NodeB = "node-b"
	NFS   = "nfs"
)

// Config is what a cluster is made from.
type Config struct {
	// Cache is a directory for what is made once for all clusters. Several may use it at
	// the same time.
	Cache string

	// Dir is a directory that does not exist or is empty; the cluster makes it, keeps all of
	// its own files there, and Down removes it.
	Dir string

	// Parts are the programs and images, which have to stay while the cluster lives.
	Parts *parts.Parts

	// Serving is called when the API server takes objects and the NFS server runs, while the
	// nodes start; Up returns after it. Nil is nothing to do.
	Serving func(ctx context.Context, c *Cluster)

	// Log gets a line for each step, with its time. Nil is nowhere.
	Log io.Writer
}

// Cluster is one that is up. Its methods may be called at the same time.
type Cluster struct {
	dir      string
	machines map[string]*Machine
	state    state
}

// Up starts a cluster and returns when both nodes are ready. After an error, or when ctx is
// done before, nothing of it is left but the logs of what failed, which the error names. The
// cluster itself does not end with ctx.
func Up(ctx context.Context, config Config) (*Cluster, error) { return up(ctx, config) }

// Open returns a cluster that another process has brought up in dir.
func Open(dir string) (*Cluster, error) { return open(dir) }

// Kubeconfig is the path of a file with which programs on this machine reach the API server,
// as an administrator of the cluster.
func (c *Cluster) Kubeconfig() string { return c.path("kubeconfig") }

// Program is the path of one of parts.Parts.Bin.
func (c *Cluster) Program(name string) string { return filepath.Join(c.state.Bin, name) }

// Kubectl is the path of the program.
func (c *Cluster) Kubectl() string { return c.Program("kubectl") }

// Machine returns one by its name: NodeA, NodeB or NFS. It panics for any other name.
func (c *Cluster) Machine(name string) *Machine {
	m := c.machines[name]
	if m == nil {
		panic("cluster: no machine is named " + name)
	}
	return m
}
