# What one does with Berth. `make help` lists it.
.DEFAULT_GOAL := help
export CARGO_TERM_COLOR ?= auto

DRIVER ?= nvme
lab = $(or $(BERTH_LAB),/var/tmp/berth-lab)
quickstart_args = $(if $(KEEP),--keep) $(if $(AT),--path "$(AT)")

.PHONY: help quickstart build check test test-vm sanity lab lab-down bench clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: ## See it work: a pool in a folder, a volume made, mounted, written, read, grown, snapshotted, deleted (KEEP=1 leaves it; AT=/some/path mounts it there)
	@scripts/setup.sh run
	@cargo build --release --quiet
	@"$${CARGO_TARGET_DIR:-target}/release/berth" quickstart $(quickstart_args)

build: ## The release binary, target/release/berth
	cargo build --release

check: ## Format, lints, documentation, dependencies, unit tests
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --document-private-items
	cargo test --quiet --lib
	@if cargo deny --version >/dev/null 2>&1; then cargo deny --log-level error --offline check bans licenses sources; \
	else echo "SKIPPED cargo-deny: not installed (cargo install cargo-deny)"; fi

test: ## Everything that this machine can test, after installing what that needs
	@scripts/test.sh

test-vm: ## What needs NVMe disks, device mapper, quotas or the kernel's CephFS, in virtual machines (VM_ONLY="local sanity" is a part)
	@scripts/test-vm.sh

sanity: ## csi-sanity against the real binary (DRIVER=nvme, cephfs or s3)
	@scripts/sanity.sh $(DRIVER)

lab: ## A Ceph cluster on this machine, to try CephFS with (BERTH_LAB=/var/tmp/berth-lab is where; RGW=1 adds S3)
	@scripts/setup.sh lab
	@scripts/lab.sh up "$(lab)"
	@echo "Its addresses and keys:  . $(lab)/env"
	@echo "Ask it:                  ceph --conf $(lab)/ceph.conf status"

lab-down: ## Stop that cluster and remove it
	@scripts/lab.sh down "$(lab)"

bench: ## The figures of docs/benchmarks.md, measured here
	@scripts/setup.sh bench
	cargo bench --quiet --bench berth
	@scripts/bench-vm.sh

clean: ## Remove what was built
	cargo clean
