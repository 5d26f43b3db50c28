# Every target sets itself up: Python >= 3.11, make and a package index are all it takes.
#
#   make quickstart            a real model fully fine-tuned on this CPU, with a report
#   make test                  the test suite            make test-all   with the long grids
#   make check                 lint, types, layers       make test-lowest   lowest declared transformers (and torch)
#   make bench-speed TEXT=DIR  steps beside TRL's and transformers', in an environment of their own; DIR holds the data sets
#   make bench-memory TEXT=DIR bytes a parameter, exactness, time and quality of every optimizer and place to wait
#   make bench-distributed     ranks of this CPU beside one process: equality, memory, ranks that die, exports, scaling
#   make bench-evidence        coverage of the intervals of scores and level of the tests, by simulation
#
# PYTHON=python3.12                   another interpreter
# TORCH_INDEX=URL                     fetch torch from this index, such as the CPU-only one that pytorch.org's installer names
# pip's own settings (index, proxy, cache) apply as they do everywhere.

PYTHON ?= python3
VENV ?= .venv
PEER = .venv-peer
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
EXTRAS = gguf,rouge,report,data
SETTINGS = pyproject.toml constraints.txt

.PHONY: quickstart test test-all test-lowest check format bench-quickstart bench-speed bench-memory bench-distributed bench-evidence clean

quickstart: $(VENV)/.installed
	@echo "environment: $(VENV)"
	$(BIN)/fullrank quickstart

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m ""

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quickstart: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/quickstart.py

bench-speed: $(VENV)/.installed-dev $(PEER)/.installed
	$(BIN)/python benchmarks/speed.py --text $(TEXT) --peer $(PEER)/bin/python
	$(BIN)/python benchmarks/steps.py --text $(TEXT)
	$(BIN)/python benchmarks/rows.py --text $(TEXT)

bench-memory: $(VENV)/.installed-dev $(PEER)/.installed
	$(BIN)/python benchmarks/memory.py --text $(TEXT) --peer $(PEER)/bin/python

bench-distributed: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/scaling.py

bench-evidence: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/evidence_statistics.py

test-lowest:
	$(PYTHON) tests/lowest.py

$(VENV)/.installed: $(SETTINGS)
	@if [ -f $@ ]; then echo "settings changed: updating $(VENV)"; else echo "setting up $(VENV)"; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --editable ".[$(EXTRAS),dev]"
	@touch $@

$(PEER)/.installed: constraints.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --constraint constraints.txt torch
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt trl transformers accelerate datasets psutil
	@touch $@

clean:
	rm -rf $(VENV) $(PEER) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
