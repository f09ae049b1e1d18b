package supervisor

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUnmodifiedMappings(t *testing.T) {
	const smaps = `00400000-00500000 r-xp 00000000 fe:00 12 /bin/it
Size:               1024 kB
Anonymous:             0 kB
00500000-00600000 r--p 00100000 fe:00 12 /bin/it
Anonymous:             4 kB
00600000-00700000 rw-p 00200000 fe:00 12 /bin/it
Anonymous:             0 kB
00700000-00800000 r--p 00000000 fe:00 13 /bin/other
Anonymous:             0 kB
c000000000-c000400000 rw-p 00000000 00:00 0
Anonymous:             0 kB
`
	got := unmodifiedMappings(smaps, "/bin/it")
	if diff := cmp.Diff([]mapping{{0x400000, 0x500000}}, got, cmp.AllowUnexported(mapping{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	own, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if len(unmodifiedMappings(string(own), exe)) == 0 {
		t.Error("no mapping of this program is found")
	}
	shedStartup() // and still alive
}
