package main

import (
	"github.com/csi-imgdisk/csi-imgdisk/pkg/driver"
)

// sizeValue is a flag whose value is a size such as 64K or 10Gi.
type sizeValue int64

// String implements pflag.Value.
func (s *sizeValue) String() string {
	if *s == 0 {
		return ""
	}
	return humanSize(int64(*s))
}

// Type implements pflag.Value.
func (s *sizeValue) Type() string { return "size" }

// Set implements pflag.Value.
func (s *sizeValue) Set(text string) error {
	bytes, err := driver.ParseSize(text)
	if err != nil {
		return err
	}
	*s = sizeValue(bytes)
	return nil
}
