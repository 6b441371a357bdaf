# make quickstart   raw text to a live two-tenant endpoint, on this machine
# make test         lint, types and the test suite
# make test-all     also the long campaigns
# make PYTHON=python3.12 …   with another Python (3.11 or newer)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
export PIP_REQUIRE_VIRTUALENV := true

.PHONY: quickstart test test-all lint venv clean
.DEFAULT_GOAL := quickstart

quickstart: venv
	$(BIN)/ftray quickstart $(ARGS)

# Tests of one process share the cores; those of ranks and clusters want the machine for themselves.
ALONE := tests/unit tests/e2e
TOGETHER := tests/dist tests/ray tests/gpu

test: lint
	$(BIN)/python -m pytest $(ALONE) -m "not slow" --numprocesses=logical --maxprocesses=8 --dist=loadfile $(ARGS)
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow" $(ARGS)

test-all: lint
	$(BIN)/python -m pytest $(ALONE) --numprocesses=logical --maxprocesses=8 --dist=loadfile $(ARGS)
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(INSTALLED)

# Everything is pinned, the build tools too, so that nothing is fetched once this is done. deepspeed is built from
# source and its set-up imports torch, so torch and the build tools come first and nothing is built in isolation.
# The engine's native kernels are compiled last; without a compiler it says so and runs in plain torch.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m ftray.engine.native
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
