# Two commands matter: `make run` and `make test`. Both set up what is missing first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMPS := target/stamps
PIP := $(PYTHON) -m pip --quiet --disable-pip-version-check
INSTALL_WHEEL := rm -rf dist && $(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist . && \
	$(PIP) install --force-reinstall --no-deps dist/*.whl
# What the wheel is made of. Fails soft outside a git checkout, where the wheel is then always rebuilt.
SOURCES := $(shell git ls-files -- Cargo.toml Cargo.lock pyproject.toml build_backend rust python guests 2>/dev/null || echo FORCE)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# ---- set-up: each step leaves a stamp, so a second run does nothing ----

.PHONY: setup
setup: $(STAMPS)/kernel ## install what is missing: packages, virtual environment, guest kernel, wheel

$(STAMPS)/packages: tools/install-packages
	@mkdir -p $(@D)
	tools/install-packages
	@touch $@

$(STAMPS)/venv: pyproject.toml tools/python-for-venv | $(STAMPS)/packages
	@mkdir -p $(@D)
	[ -x $(PYTHON) ] || "$$(tools/python-for-venv)" -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PYTHON) tools/development-requirements.py | xargs -d '\n' $(PIP) install
	@touch $@

$(STAMPS)/wheel: $(SOURCES) $(STAMPS)/venv
	$(INSTALL_WHEEL)
	@touch $@

# The guest kernel that this host's backend wants goes into the user's cache, and from there into the wheel:
# a packed kernel is found faster. The wheel comes first all the same, because only it knows the backend.
$(STAMPS)/kernel: $(STAMPS)/wheel
	$(VENV)/bin/microvm kernel build >$@.path
	if ! grep -q _bundle $@.path; then $(INSTALL_WHEEL); fi
	@touch $@

# ---- the two commands ----

.PHONY: run
run: $(STAMPS)/kernel ## run a command in a microVM: its output shows the guest's kernel
	$(VENV)/bin/microvm run -- python3 -c 'import platform; print(platform.uname())'

.PHONY: test
test: lint test-rust test-python ## all tests

.PHONY: lint
lint: $(STAMPS)/wheel ## formatting, clippy, ruff, mypy
	cargo fmt --all --check
	cargo fmt --manifest-path guests/agent/Cargo.toml --check
	cargo clippy --quiet --workspace --all-targets --locked -- -D warnings
	cargo clippy --quiet --manifest-path guests/agent/Cargo.toml --all-targets --locked -- -D warnings
	$(VENV)/bin/ruff check python tests build_backend tools
	$(VENV)/bin/ruff format --check python tests build_backend tools
	$(VENV)/bin/mypy

.PHONY: test-rust
test-rust: $(STAMPS)/wheel ## cargo tests of every crate and of the agent
	tools/cargo-test --workspace --locked
	cd guests/agent && ../../tools/cargo-test --locked

.PHONY: test-python
test-python: $(STAMPS)/kernel ## pytest: unit, property and integration tests
	$(PYTHON) -m pytest

# ---- longer runs, each on its own ----

.PHONY: test-hardware
test-hardware: $(STAMPS)/wheel ## a chosen part of the tests on an emulated host with hardware KVM (about 10 minutes)
	tests/hardware/run

.PHONY: fuzz
fuzz: $(STAMPS)/packages ## every fuzz target for FUZZ_SECONDS (60) each
	tools/fuzz "$${FUZZ_SECONDS:-60}"

.PHONY: soak
soak: $(STAMPS)/kernel ## 200 runs in a row; nothing may be left behind
	$(PYTHON) -m pytest -m soak --timeout=1800 tests/integration

.PHONY: torture
torture: $(STAMPS)/kernel ## tests/guest for TORTURE_SECONDS (120) each, stress-ng and CPython's tests in the guest (an hour, as root)
	MICROVM_TORTURE_SECONDS=$${TORTURE_SECONDS:-120} MICROVM_TORTURE_REPORT=target/torture.txt $(PYTHON) -m pytest tests/guest
	$(PYTHON) tests/guest/outside.py stress-ng --json target/stress-ng.json
	$(PYTHON) tests/guest/outside.py cpython --json target/cpython.json

.PHONY: bench
bench: $(STAMPS)/kernel ## the benchmarks, as JSON
	$(VENV)/bin/microvm bench boot --json
	$(VENV)/bin/microvm bench run --json
	$(VENV)/bin/microvm bench exec --json
	$(VENV)/bin/microvm bench guest --json

.PHONY: wheel-release
wheel-release: $(STAMPS)/venv ## a wheel for distribution, with both kernel flavours packed
	guests/kernel/build hardware >/dev/null
	guests/kernel/build ring3 >/dev/null
	rm -rf dist && $(PYTHON) -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	ls -l dist

.PHONY: clean
clean: ## remove what was built here; the user's cache stays
	rm -rf target guests/agent/target fuzz/target dist $(VENV)
	find python/microvm/_bundle -mindepth 1 ! -name __init__.py -delete

.PHONY: FORCE
FORCE:
