# `make quickstart` makes an environment and a real encoder faster; `make test` makes an environment and runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Set TORCH= to take another build: for the quickstart and the tests the one for CPUs is enough.
TORCH ?= torch==2.13.0
# Two processes run the tests, each with one thread: more of them get into each other's way.
test test-all lowest newest: export OMP_NUM_THREADS ?= 1
# What is compiled once need not be compiled by every process that a test starts.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test test-all notebooks gpu lint lowest newest dist docs clean
help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

# torch is installed first and by itself: a resolver that meets it as a dependency may take the CUDA build.
$(BIN)/python:
	@echo "Making an environment in $(VENV), with torch and what it needs. This takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)

$(VENV)/.quickstart: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quickstart]'
	touch $@

$(VENV)/.test: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/.docs: $(BIN)/python setup.cfg constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

quickstart: $(VENV)/.quickstart ## Distil a plugin for all-MiniLM-L6-v2 and show how much faster it runs
	$(BIN)/python examples/quickstart/quickstart.py

test: $(VENV)/.test lint ## Run the linters and the tests, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(VENV)/.test lint ## Run the linters and all tests, the slow ones and those of every architecture included
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

notebooks: $(VENV)/.test ## Run the notebooks of examples/notebooks with two steps of training
	$(BIN)/python -m pytest -m "" tests/examples/test_notebooks.py

gpu: ## Check and measure everything on a GPU, with the packages of the python on the path; no network
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/.test ## Check style, types and what may import what
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lowest: ## Run the tests with the lowest versions that setup.cfg admits
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt torch==2.8.0
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[test]'
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal

newest: ## Run the tests with the newest versions that setup.cfg admits
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade torch
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pytest -n 2 --dist worksteal

dist: $(BIN)/python ## Build the source distribution and the wheel, and check what they say
	$(BIN)/pip install --quiet --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

docs: $(VENV)/.docs ## Build the site into site/, and stop at every warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove the environment and what the runs wrote
	rm -rf $(VENV) .venv-lowest .venv-newest dist build site outputs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
