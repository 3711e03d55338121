# What a person types here. Each target calls setup for what it needs, so that
# none has to be run first.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.tools/bin:$(PATH)

# Arguments for cargo nextest, such as TEST="-p skyrl-guest".
TEST ?=
# Arguments for the benchmark, such as BENCH="--quick".
BENCH ?=
# Seconds per fuzz target.
FUZZ_SECONDS ?= 60

.PHONY: help setup lint test test-images bench demo fuzz clean teardown

help: ## lists the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## installs what the other targets need, and says what and why
	@scripts/setup.sh

lint: ## format, clippy, docs, dependencies, scripts, file length
	@scripts/setup.sh lint
	@scripts/lint.sh

test-images: ## builds the images that tests start sandboxes from
	@scripts/setup.sh test
	@scripts/test-images.sh

test: test-images ## all tests, with real podman and crun
	@cargo nextest run --workspace $(TEST)

demo: ## a sandbox of this machine with each engine: start, run, fork, timings
	@scripts/setup.sh test
	@scripts/demo.sh

bench: test-images ## our engines and their peers side by side; writes bench/RESULTS.md
	@bench/run.sh $(BENCH)

fuzz: ## short runs of every fuzz target (FUZZ_SECONDS each)
	@scripts/setup.sh fuzz
	@scripts/fuzz.sh $(FUZZ_SECONDS)

clean: ## removes what was built here, test images included
	cargo clean
	rm -rf --one-file-system target .tools/bin .tools/build bench/.venv-*

teardown: ## undoes what setup changed on this machine
	@scripts/teardown.sh
