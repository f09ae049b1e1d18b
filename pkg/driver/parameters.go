package driver

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
)

// Parameters of a StorageClass.
const (
	paramStore         = "store"
	paramFormat        = "format"
	paramSubformat     = "subformat"
	paramClusterSize   = "clusterSize"
	paramPreallocation = "preallocation"
	paramTransport     = "transport"
	paramImage         = "image"
	paramImageMode     = "imageMode"
	paramIOPS          = "iops"
	paramBandwidth     = "bandwidth"
)

var parameterNames = []string{
	paramStore, paramFormat, paramSubformat, paramClusterSize, paramPreallocation,
	paramTransport, paramImage, paramImageMode, paramIOPS, paramBandwidth,
}

// mutableNames are the parameters that a VolumeAttributesClass may have.
var mutableNames = []string{paramIOPS, paramBandwidth}

// The least limits that the block server keeps; see filter.Limits.
const (
	minIOPS           = 10
	minBytesPerSecond = 1 << 20
)

// sidecarPrefix begins the parameters that are for or from Kubernetes' sidecars:
// csi.storage.k8s.io/fstype, csi.storage.k8s.io/pvc/name.
const sidecarPrefix = "csi.storage.k8s.io/"

// transports are how a kernel can reach a volume's server.
var transports = []string{"nbd", "ublk", "fuse"}

var imageModes = []string{ImageOverlay, ImageCopy}

// request is what the parameters of a StorageClass ask for.
type request struct {
	store      string // "" if not said
	source     Source // an image's, or nothing
	parameters Parameters
	limits     LimitsChange
}

// parseParameters checks parameters against what can be had. Errors name the
// parameter, its value and what is accepted.
func parseParameters(params map[string]string, formats []Format) (request, error) {
	var req request
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if strings.HasPrefix(name, sidecarPrefix) {
			continue
		}
		if !slices.Contains(parameterNames, name) {
			return request{}, fmt.Errorf("parameter %q (value %q) is unknown: %w: want one of %s",
				name, params[name], block.ErrInvalid, strings.Join(parameterNames, ", "))
		}
	}
	req.store = params[paramStore]
	req.source.Image = params[paramImage]
	if err := parseSource(params, &req); err != nil {
		return request{}, err
	}
	req.parameters.Transport = params[paramTransport]
	if err := oneOf(paramTransport, req.parameters.Transport, transports); err != nil {
		return request{}, err
	}
	if err := parseLayout(params, formats, &req.parameters); err != nil {
		return request{}, err
	}
	var err error
	if req.limits, err = parseLimits("parameter", params); err != nil {
		return request{}, err
	}
	return req, nil
}

// parseMutable understands the parameters of a VolumeAttributesClass.
func parseMutable(params map[string]string) (LimitsChange, error) {
	for _, name := range slices.Sorted(maps.Keys(params)) {
		if !slices.Contains(mutableNames, name) {
			return LimitsChange{}, fmt.Errorf("mutable parameter %q (value %q) is unknown: %w: want one of %s",
				name, params[name], block.ErrInvalid, strings.Join(mutableNames, ", "))
		}
	}
	return parseLimits("mutable parameter", params)
}

// parseLimits understands limits; those that are not there stay as they are. kind is what
// errors call what has the value.
func parseLimits(kind string, params map[string]string) (change LimitsChange, err error) {
	if value, ok := params[paramIOPS]; ok {
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n != 0 && n < minIOPS {
			return LimitsChange{}, invalid(kind+" "+paramIOPS, value, fmt.Sprintf("a number of requests per second, at least %d, or 0 for no limit", minIOPS))
		}
		change.IOPS = &n
	}
	if value, ok := params[paramBandwidth]; ok {
		n, err := ParseSize(value)
		if err != nil || n != 0 && n < minBytesPerSecond {
			return LimitsChange{}, invalid(kind+" "+paramBandwidth, value, fmt.Sprintf("bytes per second such as 100Mi, at least %s, or 0 for no limit", formatSize(minBytesPerSecond)))
		}
		change.BytesPerSecond = &n
	}
	return change, nil
}

func parseSource(params map[string]string, req *request) error {
	mode := params[paramImageMode]
	if err := oneOf(paramImageMode, mode, imageModes); err != nil {
		return err
	}
	image, ok := params[paramImage]
	if !ok {
		if mode != "" {
			return invalid("parameter "+paramImageMode, mode, "it only together with parameter "+paramImage)
		}
		return nil
	}
	if err := validateImage(image); err != nil {
		return err
	}
	if mode == "" {
		mode = ImageOverlay
	}
	req.source = Source{Image: image, ImageMode: mode}
	return nil
}

// parseLayout understands the parameters that depend on the format. Without a format a
// volume has its source's, which the store knows, or else the first.
func parseLayout(params map[string]string, formats []Format, p *Parameters) error {
	format, err := pickFormat(params[paramFormat], formats)
	if err != nil {
		return err
	}
	p.Format = params[paramFormat]
	p.Subformat = params[paramSubformat]
	if err := oneOfFormat(format, paramSubformat, p.Subformat, format.Subformats); err != nil {
		return err
	}
	p.Preallocation = params[paramPreallocation]
	if err := oneOfFormat(format, paramPreallocation, p.Preallocation, format.Preallocations); err != nil {
		return err
	}
	if size, ok := params[paramClusterSize]; ok {
		p.ClusterBytes, err = parseClusterSize(size, format)
	}
	return err
}

func pickFormat(name string, formats []Format) (Format, error) {
	if name == "" {
		return formats[0], nil
	}
	var known []string
	for _, f := range formats {
		if f.Name == name {
			return f, nil
		}
		known = append(known, f.Name)
	}
	return Format{}, invalid("parameter "+paramFormat, name, "one of "+strings.Join(known, ", "))
}

func parseClusterSize(s string, format Format) (int64, error) {
	name := "parameter " + paramClusterSize
	if format.MinClusterSize == 0 {
		return 0, invalid(name, s, "none: format "+format.Name+" has no clusters")
	}
	want := fmt.Sprintf("a power of two from %s to %s for format %s",
		formatSize(format.MinClusterSize), formatSize(format.MaxClusterSize), format.Name)
	bytes, err := ParseSize(s)
	if err != nil || bytes < format.MinClusterSize || bytes > format.MaxClusterSize || bytes&(bytes-1) != 0 {
		return 0, invalid(name, s, want)
	}
	return bytes, nil
}

// oneOf checks a parameter that may be absent.
func oneOf(name, value string, accepted []string) error {
	if value == "" || slices.Contains(accepted, value) {
		return nil
	}
	return invalid("parameter "+name, value, "one of "+strings.Join(accepted, ", "))
}

func oneOfFormat(format Format, name, value string, accepted []string) error {
	if value == "" || slices.Contains(accepted, value) {
		return nil
	}
	if len(accepted) == 0 {
		return invalid("parameter "+name, value, "none: format "+format.Name+" has no such choice")
	}
	return invalid("parameter "+name, value, "one of "+strings.Join(accepted, ", ")+" for format "+format.Name)
}

// sizeUnits are powers of 1024 however they are written, as in qemu-img.
var sizeUnits = map[string]int{"": 0, "K": 10, "Ki": 10, "M": 20, "Mi": 20, "G": 30, "Gi": 30, "T": 40, "Ti": 40}

// ParseSize understands a number of bytes such as "65536", "64K", "64Ki" or "1M".
// K and Ki are both 1024.
func ParseSize(s string) (int64, error) {
	number := strings.TrimRight(s, "KMGTi")
	shift, known := sizeUnits[s[len(number):]]
	n, err := strconv.ParseInt(number, 10, 64)
	if !known || err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("size %q: %w: want a number of bytes, or one with K, M, G or T", s, block.ErrInvalid)
	}
	return n << shift, nil
}

// formatSize is ParseSize's inverse, for people.
func formatSize(bytes int64) string {
	for _, unit := range []string{"Ti", "Gi", "Mi", "Ki"} {
		if size := int64(1) << sizeUnits[unit]; bytes >= size && bytes%size == 0 {
			return strconv.FormatInt(bytes/size, 10) + unit
		}
	}
	return strconv.FormatInt(bytes, 10)
}
