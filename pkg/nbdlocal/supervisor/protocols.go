package supervisor

import (
	"context"
	"fmt"
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
		"ublk": ublkProtocol(nil),
		"fuse": serveFUSE,
	}
}

// transportVariable tells a server in its environment which transport it will serve.
const transportVariable = "IMGDISK_TRANSPORT"

// transportEnviron is what a server's environment says of the transport.
func transportEnviron(transport string) []string {
	return []string{transportVariable + "=" + transport}
}

// ConfinedProtocols are KernelProtocols for a server that is going to confine itself: what
// its transport needs and a confined process can't get is got now. For ublk these are
// io_uring instances: rings says that confine.Rules.Rings must leave them to the process.
func ConfinedProtocols() (protocols map[string]Protocol, rings bool, err error) {
	protocols = KernelProtocols()
	if os.Getenv(transportVariable) != "ublk" {
		return protocols, false, nil
	}
	threads, err := attach.PrepareUBLK()
	if err != nil {
		return nil, false, fmt.Errorf("supervisor: %w", err)
	}
	protocols["ublk"] = ublkProtocol(threads)
	return protocols, true, nil
}

// ublkProtocol serves with threads that were made in advance, or with nil with others.
func ublkProtocol(threads *attach.UBLKThreads) Protocol {
	return func(dev block.Device) ServeFunc {
		return func(ctx context.Context, file *os.File) error {
			return attach.ServeUBLK(ctx, file, dev, attach.UBLKOptions{Threads: threads})
		}
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
