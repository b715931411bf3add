# `make tune` and `make test` do everything from a fresh clone: virtual environment, installation, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
# One thread per process: on a few cores, several processes with many threads each only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: tune test faults scenarios lint install clean help

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## the virtual environment with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

tune: $(INSTALLED)  ## the main job: prepare, search, train the best with DDP, track, register (ARGS="--preset smoke")
	$(BIN)/python jobs/tune.py $(ARGS)

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)  ## the tests, without the slowest faults and scenarios (ARGS="-k name")
	$(PYTEST) -m "not (slow and (fault or scenario))" $(ARGS)

faults: $(INSTALLED)  ## every fault, injected into real parts; what was tried goes to runs/faults.json and runs/faults.md
	$(PYTEST) -p tests.faults.report -m fault $(ARGS) $$(grep -rl "mark.fault" tests --include='test_*.py')

scenarios: $(INSTALLED)  ## long ways through several jobs, as users take them
	$(PYTEST) -m scenario $(ARGS)

lint: $(INSTALLED)  ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

clean:  ## remove the virtual environment; data and runs stay
	rm -rf $(VENV)
