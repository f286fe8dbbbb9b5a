# `make example` and `make test` do all set-up by themselves; what is done already is not done again.
VENV := $(CURDIR)/.venv
WORKERS ?= $(shell nproc)
PYTEST_ARGS ?=

# The virtiofsd that set-up may have built comes before the system's.
export PATH := $(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help example test lint bench clean

help:
	@echo "make example   boot real virtual machines: run example_project"
	@echo "make test      lint, and all tests (WORKERS=$(WORKERS), PYTEST_ARGS=...)"
	@echo "make lint      ruff and mypy"
	@echo "make bench     how long boots take, against bare QEMU"
	@echo "make clean     remove what set-up made in this folder"

example: $(VENV)/.guest
	@pytest example_project -v $(PYTEST_ARGS)

test: lint $(VENV)/.guest
	@pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	@ruff check --quiet .
	@ruff format --check --quiet .
	@mypy --no-error-summary

bench: $(VENV)/.guest
	@python benchmarks/boot.py $(BENCH_ARGS)

$(VENV)/.system: .ci/set-up
	@.ci/set-up packages
	@"$$(.ci/set-up python)" -m venv $(VENV)
	@.ci/set-up virtiofsd $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.system
	@echo "set-up: installing the project and its development tools into .venv"
	@python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Built here so that it is not the first test that waits for it.
$(VENV)/.guest: pytest_chvm/guest/initramfs.py pytest_chvm/guest/init.sh $(VENV)/.installed
	@python -c 'from pytest_chvm.launcher import *; choose_guest(VmConfig(), Settings.resolve())'
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
