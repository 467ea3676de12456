# `make help` lists the targets. Needs Python 3.11 or later, make and git; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint slow clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/installed ## install, then compress a small network on digits (a few minutes)
	$(BIN)/autocompress run recipes/digits.yaml

test: $(VENV)/installed-dev ## install with the tools for development, then run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

check: lint test ## everything a change must pass: format, lint, types, layers, fast tests

lint: $(VENV)/installed-dev ## format, lint, types and layers, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

slow: $(VENV)/installed-dev ## the tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

clean: ## remove caches and build products; keeps .venv, runs and data
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find autocompress tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than what it was made from, so a changed requirement installs again.
$(BIN)/uv: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	@touch $@

$(VENV)/installed: $(BIN)/uv $(INPUTS)
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(BIN)/uv $(INPUTS)
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev,fpga]'
	@touch $(VENV)/installed $@
