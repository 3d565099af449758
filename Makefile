# hf-purify: `make demo` and `make test` set everything up by themselves, on a fresh clone too.
#
#   HF_PURIFY_DATA   folder with data sets and weights; tests that need it are skipped without it
#   PYTHON           the interpreter to make the virtual environment with (3.11 or newer)
#   WORKERS          test processes
#   PYTEST_ARGS      more arguments for pytest, such as "-k masks"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.installed
WHEEL_VENV := .venv-wheel
SOURCES := adapters benchmarks hf_purify hub_cards recipes setup.py tests

# Threads that wait by spinning slow each other down many times over when processes share the cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help setup demo test check lint format wheel wheel-demo clean distclean

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY) ## Make the virtual environment and install hf-purify with its development tools

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hf-purify needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not found). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(READY): pyproject.toml setup.py constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev,detection,text,video,pointcloud]'
	@touch $@

demo: $(READY) ## Implant a backdoor into a small classifier, repair it with every method, show the result
	$(BIN)/hf-purify demo

# tests of one file share the victims that it trains: one process runs them all; the files with the long journeys come first
test: check ## Format, lint, types, and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: lint
	$(BIN)/mypy

lint: $(READY) ## Format and lint, as a check
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

format: $(READY) ## Format and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

wheel: $(READY) ## Build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf build

wheel-demo: wheel ## Install the wheel into an empty environment and run the demo there, outside the checkout
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check install -c constraints.txt dist/*.whl
	folder=$$(mktemp -d) && demo=$$PWD/$(WHEEL_VENV)/bin/hf-purify && cd "$$folder" && "$$demo" demo && ls -R "$$folder"

clean: ## Remove build products and caches
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(WHEEL_VENV)
	find adapters benchmarks hf_purify hub_cards recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environment too
	rm -rf $(VENV)
