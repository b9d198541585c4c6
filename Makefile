# `make quickstart` makes an environment and a real encoder faster; `make test` makes an environment and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Set TORCH= to take another build: for the quickstart and the tests the one for CPUs is enough.
TORCH ?= torch==2.13.0

.PHONY: help quickstart test test-all lint clean
help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

# torch is installed first and by itself: a resolver that meets it as a dependency may take the CUDA build.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)

$(VENV)/.quickstart: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quickstart]'
	touch $@

$(VENV)/.test: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(VENV)/.quickstart ## Distil a plugin for all-MiniLM-L6-v2 and show how much faster it runs
	$(BIN)/python examples/quickstart/quickstart.py

test: $(VENV)/.test lint ## Run the linters and the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.test lint ## Run the linters and all tests, those of every architecture included
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "long or not long"

lint: $(VENV)/.test ## Check style, types and what may import what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean: ## Remove the environment and what the runs wrote
	rm -rf $(VENV) outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
