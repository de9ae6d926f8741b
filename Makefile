# Every target sets itself up first: a virtual environment with the locked packages, made once and remade when they change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=
ifneq ($(wildcard ../shared/data/em),)
export HOLDFAST_EM_DATA ?= $(abspath ../shared/data/em)
endif

.PHONY: help setup quickstart test check benchmark smoke evidence findings causes frontier clean

help: ## This list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Virtual environment and locked packages

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "holdfast needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) with the locked packages (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --requirement requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: $(READY) ## Lab, subspace, unprotected and protected fine-tune, table (ARGS=--full for the controls)
	@$(BIN)/holdfast quickstart $(ARGS)

test: $(READY) ## All tests, on two processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/benchmarks -n 2 --dist loadfile $(ARGS)

check: $(READY) ## Lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf .typecheck build
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --target .typecheck .
	@rm -rf build
	@MYPYPATH=.typecheck $(BIN)/python -m mypy -p holdfast

benchmark: $(READY) ## Speed and memory ratios against plain TRL and a bare forward pass
	@$(BIN)/python -m pytest tests/benchmarks -q -s --timeout 0 $(ARGS)

smoke: $(READY) ## The whole path on the real rows (HOLDFAST_EM_DATA names their folder)
	@OMP_NUM_THREADS=1 $(BIN)/python -m holdfast.recipes.emergent_misalignment.smoke --output_dir runs/smoke $(ARGS)

evidence: $(READY) ## The lab's guarantees over ten seeds (long)
	@$(BIN)/python -m holdfast.recipes.lab.studies.evidence $(ARGS)

findings: $(READY) ## The paper's findings on the lab over ten seeds, with controls
	@$(BIN)/python -m holdfast.recipes.lab.studies.findings $(ARGS)

causes: $(READY) ## The causal test of the alignment subspace on the lab over ten seeds
	@$(BIN)/python -m holdfast.recipes.lab.studies.causes $(ARGS)

frontier: $(READY) ## Every protection on the lab: the frozen settings on test domains over labs and worlds (long)
	@$(BIN)/python -m holdfast.recipes.lab.studies.comparison $(ARGS)

clean: ## Remove what the targets made, except runs
	rm -rf $(VENV) .typecheck build holdfast.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
