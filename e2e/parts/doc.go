// Package parts makes what a test cluster consists of: the programs of its control plane and
// nodes, the sidecars, and the container images that the chart and the tests name.
//
//	made, err := parts.Build(ctx, "/path/to/repository/.cache/e2e")
//
// Nothing is downloaded but Go modules and Debian packages. No registry of images is
// reached: images are archives that `ctr -n k8s.io images import` takes, and have exactly the names
// by which the chart calls them. What the module proxy does not have (csi-node-driver-registrar,
// livenessprobe, pause) is replaced by small programs of this module that take the same arguments.
//
// # What is kept
//
// Every part is kept in directory parts of the cache directory, under a name that has a digest of all that it
// is made of: versions, checksums of modules, sources, the recipe. So a part is made again when
// one of those has changed and never otherwise, and a call that finds all of them takes a second
// or two. Parts that were not asked for during a week are removed.
//
// Building uses this machine's Go and its build cache, and needs root only for the driver's
// root file system, which debootstrap makes.
package parts
