package qcow2_test

import (
	"testing"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/formattest"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/qcow2"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/formats/raw"
)

func TestMain(m *testing.M) {
	formats.Register(qcow2.Format{}, raw.Format{})
	m.Run()
}

// factories are the kinds of images that Create makes, with clusters small enough for the
// suite to go through whole disks often.
func factories() []formattest.Factory {
	request := func(clusterBytes int64, options ...string) formats.CreateRequest {
		req := formats.CreateRequest{ClusterBytes: clusterBytes, Extra: map[string]string{}}
		for i := 0; i < len(options); i += 2 {
			req.Extra[options[i]] = options[i+1]
		}
		return req
	}
	kind := func(name string, create, overlay formats.CreateRequest) formattest.Factory {
		return formattest.Factory{
			Name: name, Format: qcow2.Format{}, QEMU: "qcow2", Create: create, Overlay: &overlay,
			CanShrink: true, CanRebase: true, Compressed: true,
		}
	}
	tiny := kind("v3", request(4<<10), request(4<<10))
	small := kind("64-bit refcounts", request(2<<10, "refcount_bits", "64"), request(4<<10, "refcount_bits", "32"))
	small.SizeBytes = 90<<10 + 512
	narrow := kind("1-bit refcounts", request(2<<10, "refcount_bits", "1"), request(4<<10, "refcount_bits", "2"))
	narrow.SizeBytes = 90<<10 + 512
	extended := kind("extended-l2", request(16<<10, "extended_l2", "on"), request(16<<10, "extended_l2", "on"))
	extended.GranuleBytes, extended.Compressed = 512, false
	dataFile := kind("data-file", request(4<<10, "data_file", "disk.data"), request(4<<10))
	rawFile := kind("data-file-raw", request(4<<10, "data_file", "disk.data", "data_file_raw", "on"), request(8<<10))
	// QEMU looks for data files in its working directory: see TestOracle_DataFile.
	dataFile.QEMU, rawFile.QEMU = "", ""
	onRaw := kind("on raw", formats.CreateRequest{}, request(4<<10))
	onRaw.Base = &formattest.Base{Format: raw.Format{}, QEMU: "raw", SizeBytes: 50 << 10}
	shared := kind("snapshot", request(1<<10), request(2<<10))
	shared.Format, shared.SizeBytes = snapshotted{}, 150<<10+512
	kinds := []formattest.Factory{
		tiny,
		kind("v2", request(4<<10, "compat", "0.10"), request(8<<10, "compat", "0.10")),
		small,
		narrow,
		extended,
		kind("zstd", request(4<<10, "compression_type", "zstd"), request(8<<10, "compression_type", "zstd", "refcount_bits", "8")),
		dataFile,
		rawFile,
		onRaw,
		shared,
	}
	for i := range kinds[1:] {
		kinds[1+i].Cost = 8 // what they share is tested by the first
	}
	return kinds
}

func TestConformance(t *testing.T) { formattest.Run(t, factories()...) }

func TestKillProcess(t *testing.T) { formattest.KillProcess(t, factories()[0]) }
