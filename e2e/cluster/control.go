package cluster

import (
	"context"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// controlPlane starts the programs of one.
type controlPlane struct {
	c       *Cluster
	pki     string // directory of certificates
	ca      *authority
	running map[string]*process
}

// newControlPlane makes a cluster's certificates and the files with which clients reach the
// API server: kubeconfig for programs on this machine, admin.kubeconfig for those in the
// namespace, and one for each node.
func newControlPlane(c *Cluster) (*controlPlane, error) {
	p := &controlPlane{c: c, pki: c.path("pki"), running: map[string]*process{}}
	ca, err := newAuthority(p.pki)
	if err != nil {
		return nil, err
	}
	p.ca = ca
	err = errors.Join(
		ca.server("apiserver", []string{apiAddress, serviceAddress, c.state.Network.APIAddress, "127.0.0.1"},
			[]string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"}),
		p.signOnly("apiserver-kubelet-client", pkix.Name{CommonName: "apiserver", Organization: []string{"system:masters"}}),
		p.signOnly("serviceaccount", pkix.Name{CommonName: "service accounts"}),
		p.writeKubeconfig("kubeconfig", "admin", "system:masters", c.state.Network.APIAddress),
		p.writeKubeconfig("admin.kubeconfig", "inside", "system:masters", apiAddress),
		p.writeKubeconfig("controller-manager.kubeconfig", "system:kube-controller-manager", "", apiAddress),
		p.writeKubeconfig("scheduler.kubeconfig", "system:kube-scheduler", "", apiAddress),
	)
	for _, s := range specs {
		if s.isNode() {
			err = errors.Join(err, p.writeKubeconfig(s.name+".kubeconfig", "system:node:"+s.name, "system:nodes", apiAddress))
		}
	}
	return p, err
}

func (p *controlPlane) signOnly(name string, subject pkix.Name) error {
	_, err := p.ca.client(name, subject.CommonName, firstOf(subject.Organization))
	return err
}

func firstOf(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[0]
}

func (p *controlPlane) writeKubeconfig(file, user, group, address string) error {
	config, err := p.ca.kubeconfig(file, user, group, address)
	if err != nil {
		return err
	}
	return os.WriteFile(p.c.path(file), config, 0o600)
}

// start starts etcd and the API server, which waits for it.
func (p *controlPlane) start() error {
	pki := func(name string) string { return filepath.Join(p.pki, name) }
	return errors.Join(
		p.run("etcd", "--data-dir="+p.c.path("etcd"), "--logger=zap", "--log-level=warn",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=default=http://127.0.0.1:2380",
			// On a loaded machine a member alone may be late for its own heartbeats.
			"--heartbeat-interval=1000", "--election-timeout=10000"),
		p.run("kube-apiserver", "--etcd-servers=http://127.0.0.1:2379",
			"--advertise-address="+apiAddress, "--bind-address=0.0.0.0", "--secure-port="+apiPort,
			"--service-cluster-ip-range="+serviceCIDR, "--allow-privileged=true", "--authorization-mode=Node,RBAC",
			"--enable-admission-plugins=NodeRestriction", "--client-ca-file="+pki("ca.crt"),
			"--tls-cert-file="+pki("apiserver.crt"), "--tls-private-key-file="+pki("apiserver.key"),
			"--kubelet-client-certificate="+pki("apiserver-kubelet-client.crt"), "--kubelet-client-key="+pki("apiserver-kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+pki("serviceaccount.crt"),
			"--service-account-signing-key-file="+pki("serviceaccount.key")),
	)
}

// startControllers starts what needs an API server that is ready: it waits for one, but not for
// as long as one takes to start on a loaded machine.
func (p *controlPlane) startControllers() error {
	pki := func(name string) string { return filepath.Join(p.pki, name) }
	return errors.Join(
		p.run("kube-controller-manager", "--kubeconfig="+p.c.path("controller-manager.kubeconfig"),
			"--leader-elect=false", "--use-service-account-credentials=true", "--root-ca-file="+pki("ca.crt"),
			"--service-account-private-key-file="+pki("serviceaccount.key"), "--allocate-node-cidrs=false",
			// Kubelets say every 10 s that they live.
			"--node-monitor-grace-period=30s"),
		p.run("kube-scheduler", "--kubeconfig="+p.c.path("scheduler.kubeconfig"), "--leader-elect=false"),
	)
}

// run starts a program of the parts; its output goes to its log.
func (p *controlPlane) run(program string, args ...string) error {
	line := p.c.state.Network.inside(filepath.Join(p.c.state.Bin, program), args...)
	started, err := startProcess(p.c.dir, p.c.path("logs", program+".log"), line)
	if err != nil {
		return fmt.Errorf("start %s: %w", program, err)
	}
	p.running[program] = started
	return nil
}

// serve does what needs the API server, once it is ready; then that takes all objects there are.
func (p *controlPlane) serve(ctx context.Context, crds []string, log *steps) error {
	if err := p.waitAPI(ctx); err != nil {
		return err
	}
	log.done("the API server is ready")
	if err := p.startControllers(); err != nil {
		return err
	}
	return p.snapshots(ctx, crds)
}

// snapshots installs the custom resources of snapshots and runs their controller.
func (p *controlPlane) snapshots(ctx context.Context, crds []string) error {
	args := []string{"--kubeconfig=" + p.c.Kubeconfig(), "apply", "--server-side"}
	for _, file := range crds {
		args = append(args, "--filename="+file)
	}
	if err := command(ctx, p.c.Kubectl(), args...); err != nil {
		return err
	}
	return p.run("snapshot-controller", "--kubeconfig="+p.c.path("admin.kubeconfig"), "--leader-election=false",
		"--http-endpoint=127.0.0.1:8089")
}

// Limits of waiting, for a machine that others load, too.
const (
	apiReadyLimit   = 5 * time.Minute
	nodesReadyLimit = 20 * time.Minute
)

// waitAPI waits until the API server is ready.
func (p *controlPlane) waitAPI(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, apiReadyLimit)
	defer cancel()
	client, err := p.c.client()
	if err != nil {
		return err
	}
	for {
		result := client.RESTClient().Get().AbsPath("/readyz").Do(ctx)
		var code int
		if result.StatusCode(&code); code == http.StatusOK {
			return nil
		}
		if err := p.checkRunning(); err != nil {
			return err
		}
		if err := sleep(ctx, pollInterval); err != nil {
			return fmt.Errorf("the API server is not ready: %w", errors.Join(result.Error(), err))
		}
	}
}

// checkRunning returns an error with the end of its log if a program has ended.
func (p *controlPlane) checkRunning() error {
	for name, r := range p.running {
		select {
		case <-r.ended:
			return fmt.Errorf("%s has ended:\n%s", name, lastLines(p.c.path("logs", name+".log"), 10))
		default:
		}
	}
	return nil
}

// waitNodes waits until all nodes are ready.
func (p *controlPlane) waitNodes(ctx context.Context, log *steps) error {
	ctx, cancel := context.WithTimeout(ctx, nodesReadyLimit)
	defer cancel()
	client, err := p.c.client()
	if err != nil {
		return err
	}
	missing := map[string]bool{}
	for _, s := range specs {
		missing[s.name] = s.isNode()
	}
	for {
		nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err == nil {
			for _, n := range nodes.Items {
				if missing[n.Name] && nodeReady(&n) {
					missing[n.Name] = false
					log.done("%s is ready", n.Name)
				}
			}
		}
		if !missing[NodeA] && !missing[NodeB] {
			return nil
		}
		if err := p.checkRunning(); err != nil {
			return err
		}
		if sleepErr := sleep(ctx, pollInterval); sleepErr != nil {
			return fmt.Errorf("not all nodes are ready: %w", errors.Join(err, sleepErr))
		}
	}
}

// client returns one that reaches the API server from this machine.
func (c *Cluster) client() (*kubernetes.Clientset, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.Dial = (&net.Dialer{Timeout: 5 * time.Second}).DialContext
	return kubernetes.NewForConfig(config)
}
