package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/csi-imgdisk/csi-imgdisk/internal/testenv"
)

// service is one of the programs that a cluster runs.
type service struct {
	cmd  *exec.Cmd
	done chan error
	log  *lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// startService starts a service, which is told to stop when the test ends and then has to
// end without complaint.
func startService(t *testing.T, args ...string) *service {
	t.Helper()
	s := &service{cmd: exec.Command(binary, args...), done: make(chan error, 1), log: &lockedBuffer{}}
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.WaitDelay = time.Second // its children may have its output
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { s.done <- s.cmd.Wait() }()
	t.Cleanup(func() {
		s.stop(t)
		if t.Failed() {
			t.Logf("csi-imgdisk %s:\n%s", args[0], s.log)
		}
	})
	return s
}

func (s *service) stop(t *testing.T) {
	t.Helper()
	if s.done == nil {
		return
	}
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.done:
		if code := s.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%s ends with %v", s.cmd.Args[1], s.cmd.ProcessState)
		}
	case <-time.After(2 * time.Minute):
		t.Errorf("%s does not end", s.cmd.Args[1])
		_ = s.cmd.Process.Kill()
	}
	s.done = nil
}

// dialCSI connects to a service's socket.
func dialCSI(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// eventually polls until a condition holds.
func eventually(t *testing.T, what string, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// freeAddress returns an address that nobody listens on just now.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func httpGet(url string) (code int, body string, err error) {
	resp, err := http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(data), err
}

var blockWriter = &csi.VolumeCapability{
	AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
}

func createRequest(name, store string) *csi.CreateVolumeRequest {
	return &csi.CreateVolumeRequest{
		Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 8 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{blockWriter}, Parameters: map[string]string{"store": store},
	}
}

// Two controllers serve stores, one of which is not there at first; asked at the same time
// for one volume, they make one.
func TestController_TwoReplicasAndALateStore(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	early, late := filepath.Join(dir, "early"), filepath.Join(dir, "late")
	if err := os.Mkdir(early, 0o700); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "stores.json")
	writeFile(t, config, fmt.Appendf(nil, `{"stores": [{"name": "early", "path": %q, "init": true}, {"name": "late", "path": %q}]}`, early, late))
	address := freeAddress(t)
	var clients []csi.ControllerClient
	for i := range 2 {
		socket := filepath.Join(dir, fmt.Sprintf("controller%d.sock", i))
		args := []string{"controller", "--endpoint", "unix://" + socket, "--store-config", config}
		if i == 0 {
			args = append(args, "--http-address", address)
		}
		startService(t, args...)
		clients = append(clients, csi.NewControllerClient(dialCSI(t, socket)))
	}
	eventually(t, "the early store is there for both", func() error {
		for _, c := range clients {
			if _, err := c.CreateVolume(ctx, createRequest("first", "early")); err != nil {
				return err
			}
		}
		return nil
	})
	for i, c := range clients {
		_, err := c.CreateVolume(ctx, createRequest("v", "late"))
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), late) {
			t.Errorf("controller %d, a volume in a store that is not there: %v", i, err)
		}
	}
	eventually(t, "readiness names the late store", func() error {
		code, body, err := httpGet("http://" + address + "/readyz")
		if err != nil || code != http.StatusServiceUnavailable || !strings.Contains(body, "store late: ") {
			return fmt.Errorf("%d %s %w", code, body, err)
		}
		return nil
	})

	var wait sync.WaitGroup
	answers := make([]*csi.CreateVolumeResponse, 8)
	errs := make([]error, len(answers))
	for i := range answers {
		wait.Go(func() { answers[i], errs[i] = clients[i%2].CreateVolume(ctx, createRequest("both", "early")) })
	}
	wait.Wait()
	for i, err := range errs {
		if err != nil && status.Code(err) != codes.Aborted { // another call is at it
			t.Errorf("call %d: %v", i, err)
		}
		if err == nil && answers[i].GetVolume().GetVolumeId() != "early/both" {
			t.Errorf("call %d made %s", i, answers[i].GetVolume().GetVolumeId())
		}
	}
	list, err := clients[1].ListVolumes(ctx, &csi.ListVolumesRequest{})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a list without one of the stores: %v, %v", list, err)
	}

	if err := os.Mkdir(late, 0o700); err != nil {
		t.Fatal(err)
	}
	ok(t, "store", "init", late)
	eventually(t, "the late store is there", func() error {
		_, err := clients[0].CreateVolume(ctx, createRequest("v", "late"))
		return err
	})
	eventually(t, "the controller is ready", func() error {
		code, body, err := httpGet("http://" + address + "/readyz")
		if err != nil || code != http.StatusOK {
			return fmt.Errorf("%d %s %w", code, body, err)
		}
		return nil
	})
	_, body, err := httpGet("http://" + address + "/metrics")
	if err != nil || !strings.Contains(body, `csi_imgdisk_store_open{store="late"} 1`) {
		t.Errorf("metrics: %v\n%s", err, body)
	}
}

// A directory with something else in it does not become a store.
func TestController_InitRefusesOtherContents(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "store")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(root, "somebody's.txt"), nil)
	config := filepath.Join(dir, "stores.json")
	writeFile(t, config, fmt.Appendf(nil, `{"stores": [{"name": "a", "path": %q, "init": true}]}`, root))
	socket := filepath.Join(dir, "csi.sock")
	startService(t, "controller", "--endpoint", "unix://"+socket, "--store-config", config)
	client := csi.NewControllerClient(dialCSI(t, socket))
	eventually(t, "the reason is told", func() error {
		_, err := client.CreateVolume(context.Background(), createRequest("v", "a"))
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "somebody's.txt") {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if _, err := os.Stat(filepath.Join(root, "store.json")); err == nil {
		t.Error("it is a store now")
	}
}

// The node plugin has a volume attached by a supervisor that somebody else runs, whose end
// the guard mends, and that outlives the plugin.
func TestNode_WithTheDataPlane(t *testing.T) {
	testenv.Root(t)
	ctx := context.Background()
	dir := t.TempDir()
	root, runDir := filepath.Join(dir, "store"), filepath.Join(dir, "run")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	ok(t, "store", "init", root)
	storeFlag := "main=" + root
	controllerSocket, nodeSocket := filepath.Join(dir, "controller.sock"), filepath.Join(dir, "node.sock")
	startService(t, "controller", "--endpoint", "unix://"+controllerSocket, "--store", storeFlag)
	startNode := func() *service {
		return startService(t, "node", "--endpoint", "unix://"+nodeSocket, "--node-id", "n1", "--store", storeFlag, "--run-dir", runDir)
	}
	plugin := startNode()
	controller, node := csi.NewControllerClient(dialCSI(t, controllerSocket)), csi.NewNodeClient(dialCSI(t, nodeSocket))

	var volume string
	eventually(t, "a volume is made", func() error {
		resp, err := controller.CreateVolume(ctx, createRequest("v", "main"))
		volume = resp.GetVolume().GetVolumeId()
		return err
	})
	published, err := controller.ControllerPublishVolume(ctx, &csi.ControllerPublishVolumeRequest{VolumeId: volume, NodeId: "n1", VolumeCapability: blockWriter})
	if err != nil {
		t.Fatal(err)
	}
	stage := &csi.NodeStageVolumeRequest{
		VolumeId: volume, StagingTargetPath: filepath.Join(dir, "staging"), VolumeCapability: blockWriter,
		PublishContext: published.GetPublishContext(),
	}
	eventually(t, "the plugin starts no supervisor", func() error {
		if _, err := node.NodeStageVolume(ctx, stage); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "supervisor") {
			return fmt.Errorf("stage without a supervisor: %v", err)
		}
		return nil
	})
	if supervisorRuns(t, runDir) {
		t.Error("the node plugin started a supervisor")
	}

	dataPlane := startService(t, "supervisor", "--guard", "--run-dir", runDir, "--store", storeFlag)
	eventually(t, "the volume is staged", func() error {
		_, err := node.NodeStageVolume(ctx, stage)
		if err != nil && status.Code(err) != codes.Unavailable {
			t.Fatal(err)
		}
		return err
	})
	unstage := &csi.NodeUnstageVolumeRequest{VolumeId: volume, StagingTargetPath: stage.GetStagingTargetPath()}
	t.Cleanup(func() { _, _ = node.NodeUnstageVolume(ctx, unstage) })

	supervisorPID := func() int {
		st, err := runningSupervisor(runDirAt(runDir)).Status(ctx)
		if err != nil {
			return 0
		}
		return st.PID
	}
	first := supervisorPID()
	if first == 0 || first == dataPlane.cmd.Process.Pid {
		t.Fatalf("the supervisor is process %d, its guard %d", first, dataPlane.cmd.Process.Pid)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "there is another supervisor", func() error {
		if pid := supervisorPID(); pid == 0 || pid == first {
			return fmt.Errorf("process %d", pid)
		}
		return nil
	})

	plugin.stop(t)
	plugin = startNode()
	eventually(t, "a new plugin finds the volume staged, and unstages it", func() error {
		if _, err := node.NodeStageVolume(ctx, stage); err != nil {
			return err
		}
		_, err := node.NodeUnstageVolume(ctx, unstage)
		return err
	})
	list, err := runningSupervisor(runDirAt(runDir)).List(ctx)
	if err != nil || len(list) > 0 {
		t.Errorf("attached after all: %v, %v", list, err)
	}
	plugin.stop(t)
	dataPlane.stop(t)
	waitGone(t, runDir)
}

func runDirAt(path string) runDir { return runDir(path) }

// What the data plane says about a store that it cannot mount, the node plugin tells.
func TestNode_StoreNotMounted(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	runPath := filepath.Join(dir, "run")
	config := filepath.Join(dir, "stores.json")
	// Nothing answers there, and the kernel or mount may not know NFS at all.
	writeFile(t, config, []byte(`{"stores": [{"name": "nas", "nfs": {"server": "127.0.0.1", "path": "/none", "mountOptions": ["nfsvers=4.2", "retry=0", "port=1"]}}]}`))
	common := []string{"--store-config", config, "--mount-dir", filepath.Join(dir, "stores"), "--run-dir", runPath}
	startService(t, append([]string{"supervisor"}, common...)...)
	socket := filepath.Join(dir, "node.sock")
	startService(t, append([]string{"node", "--endpoint", "unix://" + socket, "--node-id", "n1"}, common...)...)
	node := csi.NewNodeClient(dialCSI(t, socket))
	eventually(t, "the reason is told", func() error {
		_, err := node.NodeStageVolume(context.Background(), &csi.NodeStageVolumeRequest{
			VolumeId: "nas/v", StagingTargetPath: filepath.Join(dir, "staging"), VolumeCapability: blockWriter,
			PublishContext: map[string]string{"epoch": "1", "volume": "v"},
		})
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "mount 127.0.0.1:/none: ") {
			return fmt.Errorf("%v", err)
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("several lines: %v", err)
		}
		return nil
	})
}
