package attachtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/csi-imgdisk/csi-imgdisk/pkg/block"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/attach"
	"github.com/csi-imgdisk/csi-imgdisk/pkg/nbdlocal/confine"
)

// roleVariable says what a process started from the test binary shall be.
const roleVariable = "IMGDISK_ATTACHTEST_ROLE"

// serverConfig is a server's whole configuration.
type serverConfig struct {
	Protocol    string
	Files       int    // descriptors inherited, from 3 on
	Path        string // the file to serve
	ReadOnly    bool
	FullAt      int64 // writes beyond this byte find no space; 0 = none do
	DelayMillis int   // every request takes at least this long
	// StallFile, while it exists, keeps requests waiting that begin at StallAt or later.
	StallFile string
	StallAt   int64
	Mute      bool // take no requests at all
	Confined  bool // as the servers of volumes are
}

// supervisorConfig is that of a process that attaches and then waits to be killed.
type supervisorConfig struct {
	Config Config
	Spec   attach.Spec
	Server serverConfig
}

// supervisorReport is what it prints once it has attached.
type supervisorReport struct {
	State  attach.State
	Server int // process number
	Error  string
}

// Main runs the tests, or what this process was started as instead.
func Main(m *testing.M) {
	role, config, _ := strings.Cut(os.Getenv(roleVariable), " ")
	var err error
	switch role {
	case "":
		os.Exit(m.Run())
	case "server":
		var cfg serverConfig
		if err = json.Unmarshal([]byte(config), &cfg); err == nil {
			err = runServer(cfg)
		}
	case "supervisor":
		var cfg supervisorConfig
		if err = json.Unmarshal([]byte(config), &cfg); err == nil {
			err = runSupervisor(cfg)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// command returns the test binary as another process. It is killed with ctx.
func command(ctx context.Context, role string, config any) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(config)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), roleVariable+"="+role+" "+string(b))
	cmd.Stderr = os.Stderr
	return cmd, nil
}

// runServer serves the descriptors from 3 on, and says so on standard output.
func runServer(cfg serverConfig) error {
	dev, err := openFileDevice(cfg)
	if err != nil {
		return err
	}
	var files []*os.File
	for i := range cfg.Files {
		files = append(files, os.NewFile(uintptr(3+i), "transport"))
	}
	threads, err := prepare(cfg)
	if err != nil {
		return err
	}
	fmt.Println("serving")
	if cfg.Mute {
		time.Sleep(time.Hour)
	}
	// A signal ends it in order.
	ctx, cancel := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer cancel()
	if err := serve(ctx, cfg.Protocol, files, dev, threads); err != nil {
		return err
	}
	for _, f := range files {
		f.Close()
	}
	return dev.Flush()
}

// prepare does what comes before serving: a confined server makes its rings before.
func prepare(cfg serverConfig) (threads *attach.UBLKThreads, err error) {
	if !cfg.Confined {
		return nil, nil
	}
	if cfg.Protocol == "ublk" {
		if threads, err = attach.PrepareUBLK(); err != nil {
			return nil, err
		}
	}
	_, err = confine.Process(confine.Rules{Rings: threads != nil})
	return threads, err
}

// serve returns when the device is gone, or ctx has ended.
func serve(ctx context.Context, protocol string, files []*os.File, dev block.Device, threads *attach.UBLKThreads) error {
	switch protocol {
	case "fuse":
		return attach.ServeFUSE(ctx, files[0], dev, attach.FUSEOptions{})
	case "ublk":
		return attach.ServeUBLK(ctx, files[0], dev, attach.UBLKOptions{Threads: threads})
	}
	server := nbdlocal.NewServer(dev, nbdlocal.Options{})
	errs := make(chan error, len(files))
	for _, f := range files {
		go func() { errs <- server.ServeConn(ctx, f) }()
	}
	var all []error
	for range files {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// startServer starts a server process and returns once it is serving.
func startServer(ctx context.Context, cfg serverConfig, files []*os.File) (*exec.Cmd, error) {
	cfg.Files = len(files)
	cmd, err := command(ctx, "server", cfg)
	if err != nil {
		return nil, err
	}
	cmd.ExtraFiles = files
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "serving\n" {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, fmt.Errorf("server said %q: %w", line, err)
	}
	return cmd, nil
}

func runSupervisor(cfg supervisorConfig) error {
	var report supervisorReport
	hooks := attach.Hooks{
		Persist: func(attach.State) error { return nil },
		Serve: func(_ context.Context, protocol string, files []*os.File) error {
			cfg.Server.Protocol = protocol
			cmd, err := startServer(context.Background(), cfg.Server, files)
			if err == nil {
				report.Server = cmd.Process.Pid
			}
			return err
		},
	}
	st, err := newTransport(cfg.Config).Attach(context.Background(), cfg.Spec, hooks)
	if report.State = st; err != nil {
		report.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin) // until killed
	return err
}

// startSupervisor starts a process that attaches, and returns when it has.
func startSupervisor(ctx context.Context, cfg supervisorConfig) (*exec.Cmd, supervisorReport, error) {
	var report supervisorReport
	cmd, err := command(ctx, "supervisor", cfg)
	if err != nil {
		return nil, report, err
	}
	if _, err := cmd.StdinPipe(); err != nil {
		return nil, report, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, report, err
	}
	if err := cmd.Start(); err != nil {
		return nil, report, err
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err == nil {
		err = json.NewDecoder(bytes.NewReader(line)).Decode(&report)
	}
	if err == nil && report.Error != "" {
		err = fmt.Errorf("supervisor: %s", report.Error)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	return cmd, report, err
}
