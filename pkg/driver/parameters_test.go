package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

func TestParseParameters(t *testing.T) {
	for name, test := range map[string]struct {
		params map[string]string
		want   request
	}{
		"none": {nil, request{}},
		"all": {
			map[string]string{
				"store": "main", "format": "vmdk", "subformat": "monolithicSparse", "clusterSize": "64Ki",
				"preallocation": "off", "transport": "fuse", "image": "golden/disk.vmdk", "imageMode": "copy",
			},
			request{
				store:      "main",
				source:     Source{Image: "golden/disk.vmdk", ImageMode: ImageCopy},
				parameters: Parameters{Format: "vmdk", Subformat: "monolithicSparse", ClusterBytes: 64 << 10, Preallocation: "off", Transport: "fuse"},
			},
		},
		"an image is an overlay": {
			map[string]string{"image": "disk.vmdk"},
			request{source: Source{Image: "disk.vmdk", ImageMode: ImageOverlay}},
		},
		"Kubernetes' own": {
			map[string]string{
				"csi.storage.k8s.io/fstype": "xfs", "csi.storage.k8s.io/pvc/name": "claim",
				"csi.storage.k8s.io/pvc/namespace": "default", "csi.storage.k8s.io/pv/name": "pv",
			},
			request{},
		},
		"the first format is the default": {map[string]string{"clusterSize": "64K"}, request{parameters: Parameters{ClusterBytes: 64 << 10}}},
		"limits": {
			map[string]string{"iops": "500", "bandwidth": "100Mi"},
			request{limits: LimitsChange{IOPS: new(int64(500)), BytesPerSecond: new(int64(100 << 20))}},
		},
		"no limit":                          {map[string]string{"iops": "0"}, request{limits: LimitsChange{IOPS: new(int64(0))}}},
		"a megabyte":                        {map[string]string{"clusterSize": "1M"}, request{parameters: Parameters{ClusterBytes: 1 << 20}}},
		"what only another format can have": {map[string]string{"format": "raw", "preallocation": "falloc"}, request{parameters: Parameters{Format: "raw", Preallocation: "falloc"}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseParameters(test.params, testFormats)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(request{})); diff != "" {
				t.Errorf("want, got: %s", diff)
			}
		})
	}
}

func TestParseParameters_Refused(t *testing.T) {
	for name, test := range map[string]struct {
		params map[string]string
		names  []string // what the message must say: parameter, value, accepted
	}{
		"unknown":            {map[string]string{"colour": "red"}, []string{"colour", "red", "clusterSize"}},
		"case":               {map[string]string{"Format": "vmdk"}, []string{"Format", "format"}},
		"format":             {map[string]string{"format": "zip"}, []string{"format", "zip", "vmdk, raw"}},
		"subformat":          {map[string]string{"subformat": "flat"}, []string{"subformat", "flat", "monolithicSparse, monolithicFlat"}},
		"subformat of raw":   {map[string]string{"format": "raw", "subformat": "flat"}, []string{"subformat", "flat", "raw"}},
		"preallocation":      {map[string]string{"preallocation": "some"}, []string{"preallocation", "some", "off, full"}},
		"cluster size":       {map[string]string{"clusterSize": "big"}, []string{"clusterSize", "big", "4Ki", "2Mi"}},
		"empty cluster size": {map[string]string{"clusterSize": ""}, []string{"clusterSize", "4Ki"}},
		"odd cluster size":   {map[string]string{"clusterSize": "65K"}, []string{"clusterSize", "65K", "power of two"}},
		"huge cluster size":  {map[string]string{"clusterSize": "4M"}, []string{"clusterSize", "4M", "2Mi"}},
		"clusters of raw":    {map[string]string{"format": "raw", "clusterSize": "64K"}, []string{"clusterSize", "raw", "no clusters"}},
		"transport":          {map[string]string{"transport": "iscsi"}, []string{"transport", "iscsi", "nbd, ublk, fuse"}},
		"image mode":         {map[string]string{"image": "a", "imageMode": "link"}, []string{"imageMode", "link", "overlay, copy"}},
		"mode without image": {map[string]string{"imageMode": "copy"}, []string{"imageMode", "copy", "image"}},
		"escaping image":     {map[string]string{"image": "../volumes/v/v.vmdk"}, []string{"image", "../volumes"}},
		"absolute image":     {map[string]string{"image": "/etc/passwd"}, []string{"image", "/etc/passwd"}},
		"empty image":        {map[string]string{"image": ""}, []string{"image"}},
		"iops in words":      {map[string]string{"iops": "many"}, []string{"parameter iops", "many", "at least 10"}},
		"few iops":           {map[string]string{"iops": "9"}, []string{"iops", `"9"`, "at least 10"}},
		"negative iops":      {map[string]string{"iops": "-1"}, []string{"iops", "-1"}},
		"small bandwidth":    {map[string]string{"bandwidth": "100"}, []string{"bandwidth", `"100"`, "at least 1Mi"}},
		"bandwidth in words": {map[string]string{"bandwidth": "fast"}, []string{"bandwidth", "fast", "100Mi"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseParameters(test.params, testFormats)
			if !errors.Is(err, block.ErrInvalid) {
				t.Fatalf("got %v, want ErrInvalid", err)
			}
			for _, part := range test.names {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "65536": 65536, "64K": 65536, "64Ki": 65536, "1M": 1 << 20, "1Mi": 1 << 20, "3G": 3 << 30, "2Ti": 2 << 40,
		"9223372036854775807": 1<<63 - 1,
	} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("%s: got %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "K", "i", "64Kii", "-1", "1.5G", "64 K", "64k", "9223372036854775808", "9000000000G", "8388608T", "0x10", "Ki64"} {
		if got, err := ParseSize(text); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%q: got %d, %v, want ErrInvalid", text, got, err)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for size, want := range map[int64]string{0: "0", 512: "512", 4096: "4Ki", 1<<20 + 1: "1048577", 300 << 20: "300Mi", 1 << 40: "1Ti"} {
		if got := formatSize(size); got != want {
			t.Errorf("%d: got %s, want %s", size, got, want)
		}
	}
}
