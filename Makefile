# Everything a developer or a CI machine does, one target each; `make help` lists them.
# `setup` needs only Python (3.11 or newer) with pip. `deps` installs the programs that the tests
# compare against where it may (Debian, as root) and otherwise says what is missing and goes on.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The machine's own python3 when it will do, else the newest one that starts; override: make PYTHON=…
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.stowray-installed
STAMP := $(VENV)/.stowray-setup
SOURCES := pipeline actors stowray tests bench release docs
WORKERS ?= 2
PYTEST ?= $(BIN)/pytest
PYTEST_ARGS ?=

# program:Debian package that has it
PEERS := docker-registry:docker-registry skopeo:skopeo umoci:umoci podman:podman \
	containerd:containerd ctr:containerd runc:runc crun:crun debootstrap:debootstrap \
	getfattr:attr ip:iproute2 setcap:libcap2-bin zstd:zstd strace:strace unshare:util-linux \
	mksquashfs:squashfs-tools bwrap:bubblewrap fish:fish zsh:zsh jq:jq tmux:tmux \
	nginx:nginx-light squid:squid chromium:chromium

.PHONY: help setup demo deps check format test test-unit test-real test-cluster bench dist docs all clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*##/\1:/p' $(firstword $(MAKEFILE_LIST)) | sed 's/: */\t/' | expand -t 16

setup: $(STAMP)  ## make .venv with stowray and its development tools (quick when it is there)

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "make setup: no Python >= 3.11 with venv and pip on PATH;" \
		"install one (Debian: apt-get install python3 python3-venv) or name it: make PYTHON=…" >&2; exit 2; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "making $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(STAMP): $(INSTALLED)
	@# Read by the interpreter, so that a pip without --group will do as well.
	@$(BIN)/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")' \
		> $(VENV)/dev-requirements.txt
	$(BIN)/python -m pip install --quiet --requirement $(VENV)/dev-requirements.txt
	@touch $@

demo: $(INSTALLED)  ## serve a small image and pre-warm two nodes with it; needs no registry
	$(BIN)/stowray demo

deps:  ## install the programs that tests compare against (Debian, as root), else name the missing
	@missing=(); packages=(); \
	export PATH="$$PATH:/usr/sbin:/sbin"; \
	for pair in $(PEERS); do \
		command -v "$${pair%%:*}" >/dev/null || { missing+=("$${pair%%:*}"); packages+=("$${pair##*:}"); }; \
	done; \
	if (( $${#missing[@]} == 0 )); then exit 0; fi; \
	if [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then \
		echo "make deps: not here: $${missing[*]}; tests that need them are skipped" \
			"(Debian: apt-get install $${packages[*]})" >&2; exit 0; \
	fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	readarray -t packages < <(printf '%s\n' "$${packages[@]}" | sort -u); \
	install=(apt-get install -y -q --no-install-recommends); \
	"$${install[@]}" "$${packages[@]}" >/dev/null 2>&1 && exit 0; \
	apt-get update -q || true; \
	"$${install[@]}" "$${packages[@]}" && exit 0; \
	for package in "$${packages[@]}"; do \
		"$${install[@]}" "$$package" || echo "make deps: $$package cannot be installed" >&2; \
	done

check: setup  ## format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy -p stowray

format: setup  ## put the sources in form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The unit tests on all workers; then those on Ray clusters, one after the other, beside the others
# with real parts, which share one registry: much of what the clusters' take is waiting for deadlines.
# The second run takes some of the clusters' as well, so that both end at about the same time.
# A test that fails is run again up to twice, and the closing line counts the reruns: hundreds of
# processes, sockets and kills on a busy machine meet moments that no test can foresee.
RERUNS ?= 2
BESIDE := tests/cluster/test_drivers.py
test: setup deps  ## every test
	status=0; \
	$(PYTEST) -n $(WORKERS) --reruns $(RERUNS) tests/unit $(PYTEST_ARGS) || status=$$?; \
	parts=$$(mktemp); \
	$(PYTEST) --reruns $(RERUNS) tests/real $(BESIDE) $(PYTEST_ARGS) >$$parts 2>&1 & \
	$(PYTEST) --reruns $(RERUNS) tests/cluster $(BESIDE:%=--ignore=%) $(PYTEST_ARGS) || status=$$?; \
	wait $$! || status=$$?; \
	cat $$parts; rm -f $$parts; \
	exit $$status

test-unit: setup  ## the unit tests only
	$(PYTEST) -n $(WORKERS) tests/unit $(PYTEST_ARGS)

test-real: setup deps  ## the command against real registries and peers
	$(PYTEST) tests/real $(PYTEST_ARGS)

test-cluster: setup  ## the tests on a Ray cluster
	$(PYTEST) tests/cluster $(PYTEST_ARGS)

bench: setup deps  ## side by side with the peers; see bench/README.md
	$(BIN)/python -m bench.compare

dist: setup  ## wheel, sdist, bill of materials and notices in dist/, checked and tried
	$(BIN)/python release/dist.py

docs: setup  ## the documentation as a site in build/site, made offline, and the man page
	$(BIN)/python docs/build.py build/site
	$(BIN)/python docs/man.py docs

all: check test  ## what CI runs

clean:  ## remove what was built
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
