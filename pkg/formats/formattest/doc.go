// Package formattest is the conformance suite for image formats: what packages block,
// formats and engine promise, as tests of a format's codec under the real engine. A
// format's own test is
//
//	func TestConformance(t *testing.T) {
//		formattest.Run(t, formattest.Factory{Name: "sparse", Format: vmdk.Format{}, QEMU: "vmdk", …})
//	}
//
//	func TestKillProcess(t *testing.T) {
//		formattest.KillProcess(t, formattest.Factory{…})
//	}
//
// # Order of reading
//
//	factory.go   what a format says about its images, and Run
//	stamp.go     data that says who wrote it
//	contents.go  what a disk may hold: now, after a kill, after a crash
//	script.go    random steps
//	rig.go       an image under test and the chain it stands on
//	player.go    plays a script on a rig and compares with the model
//	track.go     who has which file open
//	oracle.go    other people's opinion
//
// and then a file for each subtest of Run; process.go has KillProcess.
//
// # Replaying a failure
//
// A failure shows the seed, the steps up to the wrong one, and the bytes. Scripts are
// made from the seed alone, before anything runs: the same test with IMGDISK_SEED set
// plays the same steps, fails the same operation, loses the same sectors. Only crowds of
// goroutines (Concurrent) and real processes (KillProcess) also depend on the moment.
package formattest
