// Package tests are the tests of the driver in a real cluster, each as a user would do it.
// The environment variable IMGDISK_E2E names the directory of a cluster that is up and has
// the chart installed (package install); without it all tests are skipped.
//
//	TestUse        what users do, several at once: access modes, snapshots, imports, bad input
//	TestMany       60 volumes at once, of all formats, from their making to their end
//	TestProcesses  servers, node plugins and controllers killed and replaced under load
//	TestNodes      nodes without power or network, a restarted NFS server
//	TestUpstream   tests of Kubernetes' own storage suite
//
// Writers in pods (e2e/writer) check what they wrote; they are watched through the machines'
// own channel, which works when the network does not. Tables of pauses and times are
// printed, and written to IMGDISK_E2E_TABLES, or to tables/ beside the cluster's directory.
//
// A test that fails prints the events of its namespace and the states of its objects. What
// a test made is removed at its end, and nothing of it may be left in the store.
package tests
