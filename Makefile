# What a developer runs; `make` alone lists it. Everything is installed into .venv and nowhere else.
#
# PyPI's torch for Linux brings several GB of CUDA libraries. On a machine without a GPU this avoids
# them:
#     make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench gpu-check lint clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/.dev ## Create .venv with the pinned dependencies, test and development tools

demo: .venv/.runtime ## Prune and distill a small Llama on this machine, about 6 minutes on 2 cores
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

test: .venv/.dev ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

bench: .venv/.dev ## Time kernels, pruning and distillation, about 25 minutes and 9 GB of disk; writes docs/results
	$(BIN)/python -m tests.bench
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.prune --out docs/results
	$(BIN)/python -m tests.bench.pipeline --out docs/results
	$(BIN)/python -m tests.bench.distill --out docs/results

gpu-check: ## Build, test and time the kernels on this GPU with PYTHON, in minutes; writes docs/results
	@$(PYTHON) -m tests.gpu_check

lint: .venv/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files csrc | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

clean: ## Remove builds, caches and the demo's output, but not .venv
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps repeat an installation when what it depends on has changed.
.venv/.dev: .venv/.runtime
	MINITRON_BUILD_EXT=0 $(INSTALL) --no-build-isolation --editable '.[dev]' # built already
	touch $@

# torch first: with it in place nothing else resolves to another build of it, and the kernels of
# csrc/ are built for it.
.venv/.runtime: pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(BIN)/python
	$(INSTALL) torch setuptools $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(INSTALL) --no-build-isolation --editable '.[plot]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'error: $(PYTHON) is missing or older than 3.10; name another: make setup PYTHON=...' >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
