# `make quickstart` and `make test` first install what they need; if it is installed they print nothing about it.
# PYTHON=python3.12    interpreter for a new .venv (default: the newest installed of 3.10 to 3.13)
# EXTRAS=test,gpu      optional packages (default: test, and gpu where there is an NVIDIA GPU)
# WHEELHOUSE=folder    install from wheels made by `make wheelhouse`: no compiler, no root, no network
# PYTEST="-k ntxent"   arguments for pytest

SHELL := /bin/bash
MAKEFLAGS += --no-print-directory
VENV ?= .venv
PY := $(VENV)/bin/python
GPU = $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu)
CPU = $(if $(GPU),,DS_ACCELERATOR=cpu)
WORKERS ?= 2
export PYTHON EXTRAS WHEELHOUSE

.PHONY: help setup quickstart test test-full lint wheelhouse clean

help:
	@echo "make setup        install into .venv (quickstart and test do it, too)"
	@echo "make quickstart   convert, pretrain and evaluate a small run on handwritten digits, draw pictures"
	@echo "make test         check style and types, and run the tests that need no GPU (about 10 minutes on two cores)"
	@echo "make test-full    check the style and run every test, the long ones and those for a GPU, too"
	@echo "make lint         check the style by ruff and the types by mypy"
	@echo "make wheelhouse   collect wheels for machines without compiler, root or network"
	@echo "make clean        remove what was built and installed here (not your data or runs)"

setup: $(VENV)/.installed
	@:

$(VENV)/.installed: setup.py pyproject.toml tools/setup.sh
	@EXTRAS="$${EXTRAS:-test$(if $(GPU),$(comma)gpu)}" bash tools/setup.sh $(VENV)
	@touch $@

quickstart: setup
	@$(CPU) $(PY) -m fastssl quickstart

# One thread per process: the threads of two ranks on two cores would slow each other down.
test: SELECT = -m "not gpu and not full"
test test-full: lint
	@$(CPU) OMP_NUM_THREADS=1 MPLBACKEND=Agg $(PY) -m pytest $(SELECT) -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(PYTEST)

lint: setup
	@$(PY) -m ruff check -q .
	@$(PY) -m ruff format -q --check . || { echo "run: $(PY) -m ruff format ."; exit 1; }
	@bash tools/types.sh $(VENV)

wheelhouse: setup
	@bash tools/wheelhouse.sh $(VENV) wheelhouse

clean:
	rm -rf $(VENV) build dist wheelhouse *.egg-info .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,
