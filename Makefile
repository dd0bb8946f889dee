# make demo    one real run with a fault, protected, and what it came to
# make test    all tests
# make check   ruff, mypy --strict and the tidy tests
# make bench   the figures, as ratios within one run
# make eval    how the reward is judged: false alarms, delays, misses
# make sglang  builds .venv-sglang: a real SGLang server for the CPU (3 GB)
# Each creates .venv on its first use; nothing else on the machine is touched.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
FAULT ?= kill
# Tests at a time: many of them start a trainer and a server of their own.
TESTS ?= 2
# pip prefers the "+cpu" build where the index in use offers one.
TORCH ?= torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test check bench eval sglang clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "stepguard: no $(PYTHON) here; set PYTHON=/path/to/python3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stepguard: $(PYTHON) is older than 3.11; set PYTHON=/path/to/a/newer/one"; exit 1; }
	@echo "Setting up .venv (once, some minutes and about 1.5 GB: torch is in it)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch comes first and alone, so that no later resolution swaps the CPU build for another.
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/stepguard demo --fault $(FAULT) --compare

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TESTS) --dist loadgroup

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_tidy.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

eval: $(VENV)/.installed
	$(BIN)/python -m benchmarks.eval

sglang:
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" tools/sglang/build.sh

clean:
	rm -rf $(VENV) .venv-sglang build dist .mypy_cache .ruff_cache .pytest_cache
