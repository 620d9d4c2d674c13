# Two commands from a fresh clone: `make conform` and `make test`. Needs Python 3.11 to 3.13, a
# C library to run wheels on, and a package index. `make PYTHON=python3.12 test` picks a Python.

PYTHON ?= python3
BIN := .venv/bin
# Several ranks share few cores: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: conform test lint workloads bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

conform: .venv/installed ## Random traces for every named layout, table and verdict (3 minutes)
	$(BIN)/helix-conformance conform

test: .venv/installed ## All tests of a change (6 minutes)
	$(BIN)/pytest

lint: .venv/installed ## Style, types, and the walls between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

workloads: .venv/installed ## Two production traces, replayed (see README, "Real input")
	$(BIN)/helix-conformance workloads --folder $(WORKLOADS)

WORKLOADS ?= ../shared/workloads

bench: .venv/installed ## Speeds, printed as tables; nothing is asserted
	$(BIN)/python gpu_impl/benchmarks/ledger.py
	$(BIN)/python conformance/benchmarks/events.py

clean:
	rm -rf .venv build dist
