package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// startPatience is how long the driver may take to answer.
	startPatience = 20 * time.Second
	// stopPatience is how long it may take to end after SIGTERM.
	stopPatience = 30 * time.Second
	pollInterval = 5 * time.Millisecond
)

// driverProcess is a standalone driver, and connections to its services.
type driverProcess struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed once the process is gone
	conn  *grpc.ClientConn

	identity   csi.IdentityClient
	controller csi.ControllerClient
	node       csi.NodeClient
}

// startDriver runs `csi-imgdisk standalone` on the demo's store. It is in a process group
// of its own, because an interrupt from the terminal is the demo's to handle.
func (d *demo) startDriver(ctx context.Context) error {
	log, err := os.Create(d.logPath())
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(d.options.Binary, "standalone", "--endpoint", "unix://"+d.socket(),
		"--store", d.storeName()+"="+d.store(), "--run-dir", d.runDir, "--node-id", "this-machine")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p := &driverProcess{cmd: cmd, ended: make(chan struct{})}
	d.driver = p
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(p.ended)
	}()
	if err := p.connect(d.socket()); err != nil {
		return err
	}
	return p.waitReady(ctx, d.socket(), d.logPath())
}

func (p *driverProcess) connect(socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	p.conn = conn
	p.identity, p.controller, p.node = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	return nil
}

// waitReady returns once the driver answers Probe.
func (p *driverProcess) waitReady(ctx context.Context, socket, logPath string) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	for {
		// Connecting before there is a socket would make gRPC wait a second.
		_, err := os.Stat(socket)
		if err == nil {
			_, err = p.identity.Probe(ctx, &csi.ProbeRequest{})
		}
		if err == nil {
			return nil
		}
		select {
		case <-p.ended:
			return fmt.Errorf("the driver ended: %s", lastLine(logPath))
		case <-ctx.Done():
			return fmt.Errorf("the driver does not answer: %w: %s", err, lastLine(logPath))
		case <-time.After(pollInterval):
		}
	}
}

// stop ends the driver, which ends its supervisor if nothing is attached.
func (p *driverProcess) stop(ctx context.Context) error {
	if p.conn != nil {
		p.conn.Close()
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.ended:
		return nil
	case <-time.After(stopPatience):
	case <-ctx.Done():
	}
	_ = p.cmd.Process.Kill()
	<-p.ended
	return errors.New("the driver did not stop when it was told to and was killed")
}

// lastLine returns the last line of a log, for error messages.
func lastLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(lines[len(lines)-1])
}
