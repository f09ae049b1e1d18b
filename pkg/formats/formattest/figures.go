package formattest

import (
	"sync/atomic"
	"testing"
)

// Figures counts what the suite has done in this process, for reports about it.
var Figures struct {
	CrashPoints    atomic.Int64 // operations at which power was lost
	Crashes        atomic.Int64 // images looked at: several for each point
	Kills          atomic.Int64 // points at which the process was killed, in memory
	ProcessKills   atomic.Int64 // real processes killed
	InjectedErrors atomic.Int64 // file system operations that were made to fail
	HostileImages  atomic.Int64 // damaged images opened
	Repairs        atomic.Int64 // images repaired after crashes
	FuzzInputs     atomic.Int64 // inputs of fuzz targets that were played
	OracleChecks   atomic.Int64 // images that qemu-img found sound
	OracleCompares atomic.Int64 // chains that qemu-img read the same from
	OracleCrashes  atomic.Int64 // images after crashes that qemu-img looked at
}

// counted logs how much a test added to a figure.
func counted(t testing.TB, figure *atomic.Int64, what string) {
	t.Helper()
	before := figure.Load()
	t.Cleanup(func() { t.Logf("%d %s", figure.Load()-before, what) })
}
