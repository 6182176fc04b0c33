# Targets for users and CI. Each one sets itself up: `make libero-smoke` works from a bare clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/python -m uv
STAMP := $(VENV)/.ready
LOCK := requirements/cpu.lock
# OpenBLAS and OpenMP threads of several processes fight over the cores of a small machine.
export OMP_NUM_THREADS ?= 1
# Every actor is a process that imports torch and RLlib; without cached bytecode each one compiles them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-cuda lint test test-slow quickstart libero-smoke bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

setup: $(STAMP)  ## build .venv from the CPU lock; installs missing system libraries as root, else names them

$(STAMP): $(LOCK) pyproject.toml scripts/system_packages.sh
	@sh scripts/system_packages.sh
	@test -n "$(PYTHON)" || { echo "setup: no Python found; install Python 3.11 or 3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "setup: $(PYTHON) is not Python 3.11 or 3.12; run make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	sh scripts/install.sh $(BIN)/python $(LOCK)
	touch $@

setup-cuda:  ## build .venv for NVIDIA GPUs (torch 2.11, vLLM 0.26)
	$(MAKE) setup LOCK=requirements/cuda.lock PYTHON=$(shell command -v python3.12)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP)  ## every test that a 2-core machine without GPU can run
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)  ## the long ones, by hand
	$(BIN)/python -m pytest -m slow

quickstart: $(STAMP)  ## demonstrations, fine-tuning and PPO on a MuJoCo table top: success rises on 2 cores, no GPU
	rm -rf runs/quickstart
	$(BIN)/vlarl quickstart configs/quickstart.yaml --run-dir runs/quickstart

libero-smoke: $(STAMP)  ## train a tiny policy for 3 iterations on real LIBERO with real vLLM
	rm -rf runs/libero-smoke
	$(BIN)/vlarl train configs/libero_smoke_cpu.yaml --run-dir runs/libero-smoke

bench: $(STAMP)  ## measure every part on small models, beside plain loops: the table of docs/performance.md
	@for name in rollout update sync sft iteration env; do $(BIN)/vlarl bench $$name || exit; done

lock:  ## resolve the CPU lock anew (needs uv)
	uv pip compile pyproject.toml --extra cpu --extra kbit --extra data --extra dev --python-version 3.11 --overrides requirements/overrides-cpu.txt \
	  --no-emit-index-url --no-emit-find-links --no-annotate --no-header --output-file $(LOCK)
	sed -i 's/^torch==\(.*\)+cpu$$/torch==\1/' $(LOCK)

clean:  ## remove the environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info
