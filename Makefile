# `make` lists the commands. The first one that needs it sets up .venv, once.
.DEFAULT_GOAL := help
.PHONY: help train test test-devices lint lock clean

CONFIG ?= configs/laptop_chain.yaml
ARGS ?=

# requirements.txt holds the CPU build of jax. With another one in .venv (pip install -e '.[gpu]'),
# say make train JAX_PLATFORMS=cuda.
export JAX_PLATFORMS ?= cpu

VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_TO_TEST := $(VENV)/.ready-to-test
LIBTPU_RUNS := sys_platform == 'linux' and platform_machine == 'x86_64'

# PYTHON is the first of these that really runs (a pyenv shim may not), in range, best with pip.
PYTHONS := python3.11 python3.12 python3.13 python3
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
passing = $(foreach p,$(1),$(shell $(p) -c '$(2)' >/dev/null 2>&1 && echo $(p)))
usable = $(call passing,$(PYTHONS),$(IN_RANGE))
PYTHON ?= $(firstword $(call passing,$(usable),import ensurepip) $(usable))

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# Two CPU devices share out rows where one would leave a core idle; an accelerator does not see it.
train: export JAX_NUM_CPU_DEVICES ?= 2
# What is compiled once need not be compiled by the next run.
train: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
train: $(READY) ## train with CONFIG (configs/laptop_chain.yaml); more in ARGS="--set seed=1"
	@$(BIN)/python -m spo_jax.train --config $(CONFIG) $(ARGS)

test: $(READY_TO_TEST) ## run all tests, or a choice: ARGS="tests/test_losses.py -k clip"
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not devices" $(ARGS)

test-devices: $(READY_TO_TEST) ## run the tests of meshes and of several processes: 10 more minutes
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m devices --timeout 1200 $(ARGS)

lint: $(READY) ## ruff, mypy and shellcheck
	@status=0; $(BIN)/ruff check . || status=1; $(BIN)/mypy || status=1; \
	  $(BIN)/shellcheck -x launch/*.sh || status=1; exit $$status

lock: $(READY) ## resolve pyproject.toml into requirements.txt again (ARGS=--upgrade for news)
	@$(BIN)/pip install -q --disable-pip-version-check uv
	@$(BIN)/uv pip compile -q --python-version 3.11 --extra test --extra lint --no-annotate \
	  --extra math --custom-compile-command "make lock" $(ARGS) pyproject.toml -o requirements.txt
	@$(BIN)/uv pip compile -q --python-version 3.11 --extra parity --no-annotate \
	  --extra tpu-plan -c requirements.txt --custom-compile-command "make lock" $(ARGS) \
	  pyproject.toml | grep -vxFf requirements.txt \
	  | sed "s,+cpu,,; s,^libtpu.*,& ; $(LIBTPU_RUNS)," > requirements-parity.txt

clean: ## remove .venv, caches and build output; runs/ stays
	@rm -rf $(VENV) .jax_cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY_TO_TEST): $(READY) requirements-parity.txt
	@echo "Installing requirements-parity.txt (torch, to compare with; the TPU compiler)" >&2
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-parity.txt
	@touch $@

$(READY): requirements.txt pyproject.toml
	@$(BIN)/python -c '$(IN_RANGE)' 2>/dev/null || { python='$(PYTHON)'; \
	  "$$python" -c '$(IN_RANGE)' 2>/dev/null || { echo "spo_jax needs Python 3.11, 3.12 or 3.13;" \
	    "tried $${python:-$(PYTHONS)}. Say make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  "$$python" -c 'import ensurepip' 2>/dev/null || { echo "$$python has no venv module." \
	    "On Debian: apt install python3-venv" >&2; exit 1; }; \
	  "$$python" -m venv --clear $(VENV); }
	@echo "Installing requirements.txt into $(VENV): a few minutes, once" >&2
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@
