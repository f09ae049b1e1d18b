# csi-imgdisk: `make help` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Where Go's own installer puts it, for shells whose PATH does not say.
export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin
export CGO_ENABLED ?= 0

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS  := -s -w -X main.version=$(VERSION)
PACKAGES ?= ./...
RUN      ?= .
MINUTES  ?= 10
LINTER   := .cache/bin/golangci-lint

.PHONY: help build image demo test lint race fuzz conformance bench vm-test e2e e2e-full e2e-up e2e-shell e2e-down e2e-deps soak oracle-virtualbox generate verify clean go deps

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: go ## build bin/csi-imgdisk, one static binary
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/csi-imgdisk ./cmd/csi-imgdisk

image: build ## make the container image and its bill of materials in .cache/image, as root, without Docker (IMAGE_NAME=NAME:TAG)
	image/build.sh $(IMAGE_NAME)

demo: go ## run the main job end to end on this machine, as root (IMAGE=any.vmdk takes your own)
	@hack/install-deps.sh demo
	@$(MAKE) --no-print-directory build
	@exec bin/csi-imgdisk demo $(if $(IMAGE),--image '$(IMAGE)')

test: deps ## run all tests that need no virtual machine (PACKAGES=…, RUN=regexp)
	go vet $(PACKAGES)
	go test -count=1 -timeout 10m -run '$(RUN)' $(PACKAGES)

lint: go $(LINTER) ## run golangci-lint with .golangci.yml
	$(LINTER) run --allow-parallel-runners $(PACKAGES)

race: deps ## run the tests under the race detector (needs a C compiler)
	CGO_ENABLED=1 go test -race -short -count=1 -timeout 30m -run '$(RUN)' $(PACKAGES)

fuzz: go ## fuzz every parser and whole images for FUZZTIME (default 30s) each
	hack/fuzz.sh

conformance: deps ## prove every format beside other tools; the table goes into docs/formats.md (SHORT=1: a part)
	go run ./test/conformance $(if $(SHORT),-short)

bench: deps ## measure speed beside qemu-nbd, nbdkit and qemu-img, in one run (BENCH='-seconds 1', see docs/benchmarks)
	@$(MAKE) --no-print-directory build
	go run ./test/bench $(BENCH)

vm-test: go ## test transports and whole volumes in virtual machines with Debian's kernels
	go run ./test/vm

e2e: e2e-deps ## test the driver in a Kubernetes cluster of virtual machines made here, as root (RUN=regexp)
	go -C e2e run . test -run '$(RUN)'

e2e-full: e2e-deps ## e2e with all of Kubernetes's own storage tests: hours
	go -C e2e run . test -full

e2e-up: e2e-deps ## bring such a cluster up, with the driver, and keep it
	go -C e2e run . up

e2e-shell: go ## open a shell with kubectl for that cluster (MACHINE=node-a, node-b, nfs: one there)
	@go -C e2e run . shell $(MACHINE)

e2e-down: go ## take that cluster down
	go -C e2e run . down

e2e-deps: go
	@hack/install-deps.sh e2e

soak: deps ## random I/O, kills, upgrades, resizes, snapshots, stalls for MINUTES (default 10), here and in a machine (VM=0: only here)
	@$(MAKE) --no-print-directory build
	go run ./test/soak -for $(MINUTES)m $(if $(filter 0,$(VM)),,-vm)

oracle-virtualbox: go ## test images against VirtualBox's own reader and writer (downloads it into a cache)
	go run ./test/virtualbox

generate: go ## make checked-in generated files anew
	go generate ./...
	go -C tools/helm generate ./...

verify: go ## check that generated files, modules and formatting are up to date, and the parts of e2e that need no cluster
	hack/verify.sh

clean: ## remove what was built and downloaded here
	rm -rf bin .cache

# The linter is built from the versions that tools/go.sum pins.
$(LINTER): tools/go.mod tools/go.sum
	mkdir -p $(@D)
	cd tools && go build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

deps: go
	@hack/install-deps.sh test

go:
	@command -v go >/dev/null || { echo 'make: Go is not in PATH and not in /usr/local/go: install Go 1.26 or later from https://go.dev/dl/' >&2; exit 1; }
