package demo

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
)

// partition is a part of a disk, in bytes.
type partition struct{ start, size int64 }

// partitions reads a device's partition table, the largest partition first.
func partitions(ctx context.Context, device string) ([]partition, error) {
	out, err := exec.CommandContext(ctx, "sfdisk", "--json", device).Output()
	if err != nil {
		return nil, fmt.Errorf("read the partition table with sfdisk: %w", err)
	}
	var answer struct {
		PartitionTable struct {
			SectorSize int64
			Partitions []struct{ Start, Size int64 }
		}
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		return nil, fmt.Errorf("read the partition table with sfdisk: %w", err)
	}
	table := answer.PartitionTable
	if table.SectorSize == 0 {
		table.SectorSize = 512
	}
	var list []partition
	for _, p := range table.Partitions {
		list = append(list, partition{p.Start * table.SectorSize, p.Size * table.SectorSize})
	}
	slices.SortFunc(list, func(a, b partition) int { return cmp.Compare(b.size, a.size) })
	return list, nil
}

// errNoFileSystem says that nothing on a disk could be mounted.
var errNoFileSystem = errors.New("this kernel can mount nothing on it")

// hasFileSystem reports whether there is a file system on a device.
func hasFileSystem(ctx context.Context, device string) bool {
	out, err := exec.CommandContext(ctx, "blkid", "-p", "-o", "value", "-s", "USAGE", device).Output()
	return err == nil && string(bytes.TrimSpace(out)) == "filesystem"
}

// mountPartition mounts the largest partition that can be mounted, read-only.
func (d *demo) mountPartition(ctx context.Context, device, dir string) error {
	list, err := partitions(ctx, device)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	d.mounts = append(d.mounts, dir)
	var last []byte
	for _, p := range list {
		// A disk that was not shut down needs its journal, or leave to go without.
		for _, extra := range []string{"", ",noload", ",norecovery"} {
			options := fmt.Sprintf("ro,loop,offset=%d,sizelimit=%d%s", p.start, p.size, extra)
			out, err := exec.CommandContext(ctx, "mount", "-o", options, device, dir).CombinedOutput()
			if err == nil {
				return nil
			}
			last, _, _ = bytes.Cut(out, []byte("\n")) // the rest is advice
		}
	}
	return fmt.Errorf("%w: %s", errNoFileSystem, last)
}
