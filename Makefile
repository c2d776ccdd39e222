# `make demo` and `make test` do everything from a fresh clone; the only network they need is the package index.

PYTHON ?= python3
# Where torch alone comes from; on Linux https://download.pytorch.org/whl/cpu saves several GB of CUDA libraries.
TORCH_INDEX ?=

RUN := .venv/bin/python -m
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench lint types format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.* ## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(STAMP) ## the trade-off of privacy, robustness and utility on a real model and real text, into runs/tradeoff
	$(RUN) experiments.tradeoff

test: $(STAMP) ## all tests; linter, types and import contracts run among them
	$(RUN) pytest -n 2 --dist worksteal

bench: .venv-bench/.installed $(STAMP) ## aggregation, private steps, many clients, encryption, reconstruction, shadow adapters and engines beside others
	.venv-bench/bin/python -m benchmarks.aggregation
	.venv-bench/bin/python -m benchmarks.private_step
	.venv-bench/bin/python -m benchmarks.clients
	$(RUN) benchmarks.encryption
	$(RUN) benchmarks.reconstruction
	$(RUN) benchmarks.shadow
	$(RUN) benchmarks.engines

lint: $(STAMP) ## linter, formatting and import contracts only
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	.venv/bin/lint-imports --no-logo

types: $(STAMP) ## mypy only
	$(RUN) mypy

format: $(STAMP) ## rewrite the sources in the project's format
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean: ## remove caches and builds; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find privfm experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Peers never move our pins; without their dependencies, because theirs pull in other builds of torch.
.venv-bench/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --upgrade "pip>=26"
	.venv-bench/bin/python -m pip install --quiet $(TORCH_INDEX:%=--index-url %) torch==2.13.0
	.venv-bench/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	@touch $@

# Installs again whenever a pin or a dependency changed. pip 23 crashes on this set, hence the upgrade;
# torch goes first because it alone may come from an index of its own.
$(STAMP): Makefile constraints.txt pyproject.toml setup.cfg
	@echo "installing into .venv: a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "privfm needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(RUN) pip install --quiet --upgrade "pip>=26"
	$(RUN) pip install --quiet --constraint constraints.txt $(TORCH_INDEX:%=--index-url %) torch
	$(RUN) pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable ".[demo,dev,flower,nvflare,tracking]"
	@touch $@
