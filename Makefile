# Every target is a command that a person could type. `make help` lists them.
SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
GO         ?= go
LINT       := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
ENGINE     ?= 20
FUZZTIME   ?= 30s
export GOFLAGS := -tags=nosystemd -buildvcs=false

ARCH       ?= $(shell $(GO) env GOARCH)
NATIVE     := $(if $(filter $(ARCH),$(shell $(GO) env GOHOSTARCH)),yes)
BINARY     := build/weft$(if $(NATIVE),,-$(ARCH))
BUNDLE     := build/plugin$(if $(NATIVE),,-$(ARCH))
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT     ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)

.PHONY: help build plugin run test unit e2e soak vm fuzz lint bench deps clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

build: ## the static binary, build/weft; ARCH=arm64 makes build/weft-arm64
	CGO_ENABLED=0 GOARCH=$(ARCH) $(GO) build -trimpath \
		-ldflags "-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)" -o $(BINARY) ./cmd/weft

plugin: build ## the bundle for `docker plugin create`: build/plugin, or build/plugin-arm64 with ARCH=arm64
	hack/plugin.sh $(BUNDLE) $(ARCH) $(BINARY)

run: plugin ## start an engine if there is none, enable the plugin, show two containers on a network (root)
	hack/run.sh

test: deps unit plugin e2e vm ## run every test, installing what they need (root, Debian)

unit: ## tests without an engine; those of the kernel run in namespaces of their own
	REQUIRE_NETNS=1 $(GO) test -race -shuffle=on -p 3 -timeout 15m ./...

e2e: ## tests with a real engine: ENGINE=20 (Debian 12) or ENGINE=28 (Debian sid)
	ENGINE=$(ENGINE) $(GO) test -tags=e2e,nosystemd -count=1 -timeout 40m -v ./e2e/

soak: deps plugin ## faults of clusters as long as real ones, and 200 hosts
	WEFT_SOAK=1 $(GO) test -count=1 -timeout 30m -v -run 'Gossip|Scale' ./overlay
	WEFT_SOAK=1 $(GO) test -race -count=1 -timeout 30m -v -run Frozen ./cmd/weft
	WEFT_SOAK=1 ENGINE=$(ENGINE) $(GO) test -tags=e2e,nosystemd -count=1 -timeout 60m -v -run 'Overlay|Cluster' ./e2e/

vm: plugin ## tests that need ipvlan, VLAN or dummy links, under Debian's kernel in a virtual machine: VM_RUN=PATTERN
	mkdir -p build/vm
	for p in internal/netnstest internal/datapath driver e2e; do \
		CGO_ENABLED=0 $(GO) test -c -tags=e2e,nosystemd -o build/vm/$${p##*/}.test ./$$p; \
	done
	CGO_ENABLED=0 $(GO) build -tags=e2e,nosystemd -o build/vm/probe ./e2e/probe
	hack/vm.sh . env VM_RUN='$(VM_RUN)' ENGINE=$(ENGINE) hack/vm-tests.sh

fuzz: ## every fuzz target for FUZZTIME
	hack/fuzz.sh $(FUZZTIME)

lint: ## the linter, with the rules of the house
	$(GO) run $(LINT) run

bench: deps plugin ## ratios against the kernel, the disk and the built-in drivers
	$(GO) test -run '^$$' -bench . -benchtime 2s ./...
	ENGINE=$(ENGINE) $(GO) test -tags=e2e,nosystemd -count=1 -timeout 40m -run '^$$' -bench . -benchtime 1x ./e2e/

deps: ## Debian packages that the tests need
	hack/deps.sh

clean: ## what make made
	rm -rf build
