# All set-up is done by the targets themselves: `make demo` and `make test` work on a fresh machine.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
# Another torch, a CUDA build say: make TORCH='torch==2.13.0+cu130' venv
TORCH ?= torch==2.13.0
EXTRAS := deepspeed,megatron,plots,dev
STAMP := $(VENV)/.ready
OUT ?= runs/matrix
CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge iproute2 util-linux openssh-server pdsh shellcheck

# `make demo PY=python3` uses a Python that has everything already, and makes no environment.
ifeq ($(origin PY),command line)
READY :=
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input

.PHONY: help venv demo test test-cluster cluster-tools soak matrix lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' \
		| while IFS=$$'\t' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

venv: $(READY) ## make the environment in $(VENV), once; TORCH=... picks another torch

demo: $(READY) ## kill a multi-rank run and resume it, bit-identical (no GPU needed)
	@$(PY) -m launch.demo

test: lint ## lint, then all tests but the long ones of `make soak` and those of `make test-cluster`
	@$(PY) -m pytest -m 'not slow and not cluster'

test-cluster: $(READY) ## nodes killed, cut off, preempted under a real SLURM, on this machine; as root (about six minutes)
	@$(PY) -m pytest tests/cluster -m cluster

cluster-tools: ## install what `make test-cluster` needs: SLURM, munge, sshd, pdsh, shellcheck; Debian, as root
	@if [ "$$(id -u)" != 0 ]; then echo "make cluster-tools installs Debian packages: run it as root." >&2; exit 1; fi
	@apt-get update -qq
	@DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES) >/dev/null

soak: $(READY) ## the long tests: SIGKILLs over ZeRO on 2 and 4 ranks and over Megatron, the whole matrix (about ten minutes)
	@$(PY) -m pytest -m slow -s

matrix: $(READY) ## there, back and on between all topologies of the matrix (about ten minutes); OUT=... takes the results
	@$(PY) -m benchmarks.topologies --out $(OUT)

lint: $(READY) ## ruff (rules and format) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(READY) ## put the source in its format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove caches and build products; environment and runs stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist ./*.egg-info
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first, so that what builds against it finds it, and the build that pip is configured for is taken.
$(STAMP): pyproject.toml constraints.txt $(wildcard resume_kit/*/*.c)
	@python=; \
	for name in python3 python3.13 python3.12 python3.11 python3.14; do \
		if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			python="$$name"; break; \
		fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer with the venv module was found; install one (Debian: python3-venv)." >&2; \
		exit 1; \
	fi; \
	echo "Making the environment $(VENV) with $$("$$python" --version), once."; \
	"$$python" -m venv "$(VENV)"
	@{ grep -v '^torch==' constraints.txt; echo '$(TORCH)'; } > "$(VENV)/constraints.txt"
	@echo "Installing $(TORCH) (about a minute, more where it must come over a slow network) ..."
	@$(PIP) -c "$(VENV)/constraints.txt" '$(TORCH)'
	@echo "Installing DeepSpeed, Megatron-core, transformers and the tools (about two minutes) ..."
	@$(PIP) -c "$(VENV)/constraints.txt" -e '.[$(EXTRAS)]'
	@touch "$@"
	@echo "The environment is ready."
