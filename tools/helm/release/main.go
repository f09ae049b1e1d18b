// Command release installs or upgrades the chart in a cluster, as `helm upgrade --install
// --wait` does, for machines without a helm binary:
//
//	go run ./release -kubeconfig FILE -namespace csi-imgdisk -values FILE [-set-string KEY=VALUE]
//	go run ./release -kubeconfig FILE -namespace csi-imgdisk -uninstall
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/cli"
	"helm.sh/helm/v3/pkg/cli/values"
	"helm.sh/helm/v3/pkg/getter"
	"helm.sh/helm/v3/pkg/release"
	"helm.sh/helm/v3/pkg/storage/driver"
)

// config is what the flags say.
type config struct {
	kubeconfig, namespace, name, chart string
	options                            values.Options
	timeout                            time.Duration
	uninstall                          bool
}

func main() {
	var c config
	flag.StringVar(&c.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "the cluster's kubeconfig")
	flag.StringVar(&c.namespace, "namespace", "csi-imgdisk", "the release's namespace, which exists")
	flag.StringVar(&c.name, "name", "csi-imgdisk", "the release's name")
	flag.StringVar(&c.chart, "chart", "../../charts/csi-imgdisk", "the chart's directory")
	flag.Func("values", "a values file; may be given several times", appendTo(&c.options.ValueFiles))
	flag.Func("set-string", "KEY=VALUE; may be given several times", appendTo(&c.options.StringValues))
	flag.DurationVar(&c.timeout, "timeout", 5*time.Minute, "how long to wait for everything to be ready")
	flag.BoolVar(&c.uninstall, "uninstall", false, "uninstall the release instead")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func appendTo(list *[]string) func(string) error {
	return func(s string) error {
		*list = append(*list, s)
		return nil
	}
}

func run(ctx context.Context, c config) error {
	settings := cli.New()
	settings.KubeConfig = c.kubeconfig
	settings.SetNamespace(c.namespace)
	var helm action.Configuration
	if err := helm.Init(settings.RESTClientGetter(), c.namespace, "secret", log.Printf); err != nil {
		return fmt.Errorf("reach the cluster of kubeconfig %s: %w", c.kubeconfig, err)
	}
	if c.uninstall {
		return uninstall(&helm, c)
	}
	r, err := upgrade(ctx, settings, &helm, c)
	if err != nil {
		return fmt.Errorf("release %s of %s: %w", c.name, c.chart, err)
	}
	fmt.Printf("%s: revision %d is %s\n%s", r.Name, r.Version, r.Info.Status, r.Info.Notes)
	return nil
}

// upgrade installs the release if there is none, and waits until all of it is ready.
func upgrade(ctx context.Context, settings *cli.EnvSettings, helm *action.Configuration, c config) (*release.Release, error) {
	vals, err := c.options.MergeValues(getter.All(settings))
	if err != nil {
		return nil, err
	}
	chart, err := loader.Load(c.chart)
	if err != nil {
		return nil, err
	}
	_, err = action.NewGet(helm).Run(c.name)
	switch {
	case errors.Is(err, driver.ErrReleaseNotFound):
		install := action.NewInstall(helm)
		install.ReleaseName, install.Namespace = c.name, c.namespace
		install.Wait, install.Timeout = true, c.timeout
		return install.RunWithContext(ctx, chart, vals)
	case err != nil:
		return nil, err
	}
	up := action.NewUpgrade(helm)
	up.Namespace = c.namespace
	up.Wait, up.Timeout = true, c.timeout
	return up.RunWithContext(ctx, c.name, chart, vals)
}

func uninstall(helm *action.Configuration, c config) error {
	un := action.NewUninstall(helm)
	un.Wait, un.Timeout, un.IgnoreNotFound = true, c.timeout, true
	if _, err := un.Run(c.name); err != nil {
		return fmt.Errorf("uninstall %s: %w", c.name, err)
	}
	return nil
}
