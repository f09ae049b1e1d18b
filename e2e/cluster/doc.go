// Package cluster runs a Kubernetes cluster on one machine, for tests: a control plane as
// processes of this machine's, and three virtual machines: two nodes and an NFS server.
//
//	c, err := cluster.Up(ctx, cluster.Config{Cache: cache, Dir: dir, Parts: parts})
//	defer c.Down(context.WithoutCancel(ctx))
//	client := … c.Kubeconfig() …
//	out, err := c.Machine("node-a").Run(ctx, "lsblk")
//
// # What there is
//
//   - A network namespace with a bridge, one tap device for each machine, and one end of
//     a veth pair whose other end is this machine's: so programs here reach the API server,
//     and two clusters do not meet.
//   - etcd, kube-apiserver, kube-controller-manager, kube-scheduler and snapshot-controller
//     as processes in that namespace, with certificates made for the cluster.
//   - Machines under software emulation, with Debian's kernel and a Debian root file system:
//     "node-a" and "node-b" with containerd and kubelet, "nfs" with the kernel's NFS server,
//     which exports a directory of a disk of its own (see ExportPath).
//   - On each machine an agent, which runs commands that come over a virtual serial port:
//     so they can be run when the machine's network is cut, too.
//
// A cluster has no kube-proxy, no cluster DNS and no registry: pods reach the API server at
// the address of service kubernetes, by a rule on each node; images are those of the parts.
//
// # What is kept
//
// All that takes long is made once and kept below the cache: the nodes' root file system with
// the images already in containerd's store, the kernel, the agent. Machines write to layers
// above it, which go away with the cluster; they survive PowerOff and PowerOn.
//
// Down removes everything else: processes, namespace, devices, files. A cluster lives on
// when the program that made it ends, so that a developer can look at it: Open finds it.
package cluster
