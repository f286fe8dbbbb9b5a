# `make example` and `make test` do all set-up by themselves; what is done already is not done again.
VENV := $(CURDIR)/.venv
WORKERS ?= $(shell nproc)
PYTEST_ARGS ?=
# Kills of a campaign, VMs of a soak.
N ?=
SEED ?= $(shell date +%s)

# The virtiofsd that set-up may have built comes before the system's.
export PATH := $(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help example test lint bench chaos campaign soak matrix clean

help:
	@echo "make example   boot real virtual machines: run example_project"
	@echo "make test      lint, and all tests (WORKERS=$(WORKERS), PYTEST_ARGS=...)"
	@echo "make lint      ruff, import-linter, mypy and pyright"
	@echo "make bench     how long boots take, against bare QEMU"
	@echo "make chaos     runs come to grief in every way: nothing may be left (long); then a campaign"
	@echo "make campaign  N=200 random kills; SEED=... repeats them"
	@echo "make soak      N=300 VMs in one run: what the last ones cost against the first"
	@echo "make matrix    Python 3.11 to 3.14, pytest 8 and 9, the lowest versions of all dependencies: those Pythons that are here (long)"
	@echo "make clean     remove what set-up made in this folder"

example: $(VENV)/.guest
	@pytest example_project -v $(PYTEST_ARGS)

test: lint $(VENV)/.guest $(VENV)/.image
	@pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	@ruff check --quiet .
	@ruff format --check --quiet .
	@lint-imports --no-cache --no-logo >/dev/null || lint-imports --no-cache --no-logo
	@mypy --no-error-summary
	@mypy --no-error-summary --config-file example_project/pyproject.toml example_project/logbox example_project/tests
	@basedpyright --project example_project --level error

bench: $(VENV)/.guest
	@python benchmarks/boot.py $(BENCH_ARGS)

chaos: $(VENV)/.guest
	@CHVM_CHAOS=full pytest tests/chaos -n $(WORKERS) --ignore tests/chaos/test_campaign.py --ignore tests/chaos/test_soak.py $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory campaign

campaign: $(VENV)/.guest
	@echo "seed: $(SEED)"
	@CHVM_CHAOS_SEED=$(SEED) CHVM_CHAOS_KILLS=$(or $(N),200) pytest tests/chaos/test_campaign.py -n $(WORKERS) $(PYTEST_ARGS)

soak: $(VENV)/.guest
	@CHVM_SOAK_VMS=$(or $(N),300) pytest tests/chaos/test_soak.py $(PYTEST_ARGS)

matrix: $(VENV)/.guest
	@command -v uv >/dev/null || python -m pip install --quiet --disable-pip-version-check uv
	@WORKERS=$(WORKERS) PYTEST_ARGS="$(PYTEST_ARGS)" .ci/matrix $(CURDIR)/.matrix

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
	@python -c 'from pytest_chvm import Settings, VmConfig; from pytest_chvm.machine.guest_choice import choose_guest; choose_guest(VmConfig(), Settings.resolve())'
	@touch $@

# Kept in the cache, across clean too. Where there is no mmdebstrap, its tests are skipped.
$(VENV)/.image: pytest_chvm/guest/builders/debian.py pytest_chvm/guest/builders/disk.py $(VENV)/.installed
	@if command -v mmdebstrap >/dev/null; then chvm guest build debian >/dev/null; fi
	@touch $@

clean:
	rm -rf .venv .matrix .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
