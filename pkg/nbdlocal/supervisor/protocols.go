package supervisor

import (
	"context"
	"os"
	"sync"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
)

// KernelProtocols are what the transports of package attach hand out descriptors for:
// what RunServer is given by a program that serves real devices.
func KernelProtocols() map[string]Protocol {
	return map[string]Protocol{
		"nbd":  serveNBD,
		"fuse": serveFUSE,
	}
}

func serveFUSE(dev block.Device) ServeFunc {
	return func(ctx context.Context, file *os.File) error {
		return attach.ServeFUSE(ctx, file, dev, attach.FUSEOptions{})
	}
}

// serveNBD shares one nbdlocal.Server among a device's connections: it keeps requests
// in order that the kernel repeats on another one.
func serveNBD(dev block.Device) ServeFunc {
	server := nbdlocal.NewServer(dev, nbdlocal.Options{})
	var drain sync.Once // for all connections: it ends when the last one has
	return func(ctx context.Context, file *os.File) error {
		defer context.AfterFunc(ctx, func() {
			drain.Do(func() { _ = server.Drain(context.Background()) })
		})()
		// Not with ctx: that would hang up on requests that were taken.
		return server.ServeConn(context.WithoutCancel(ctx), file)
	}
}
