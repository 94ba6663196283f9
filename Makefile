# setup, train, exercises, test, slow, long, drill, check, bench, cluster-up, cluster-down: each
# installs what it needs first, given Python 3.11 and make.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# ddpm, gan, vae or flow
MODEL ?= ddpm
DATA ?= shapes
# runs/small-ddpm-shapes, runs/small-gan-cifar10, runs/small-vae-<folder's name>
NAME := $(shell basename "$(DATA)")
# The small configuration for the shapes, or that for images like CIFAR-10's.
CONFIG ?= launch/configs/$(MODEL)_small$(if $(filter shapes,$(DATA)),,_cifar10).yaml
ARGS ?=
# Scale of the exercises: small (17 minutes on two cores), medium (hours), full (GPUs)
SCALE ?= small
export PYTHONUNBUFFERED = 1

.PHONY: setup train exercises test slow long drill check bench cluster-up cluster-down clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# make train [MODEL=ddpm|gan|vae|flow] [DATA=shapes|cifar10|folder:PATH] [ARGS="--train.total_images 96000"]
# DGM_MAKE lets messages name ARGS="--data.resize 32" instead of the option alone.
train: export DGM_MAKE := 1
train: setup
	$(BIN)/python launch/run_accelerate.py --config_file accelerate_config.yaml launch/train_$(MODEL).py \
	    --config $(CONFIG) --data.source "$(DATA)" \
	    --run.dir "runs/small-$(MODEL)-$(NAME)" $(ARGS)

# make exercises [DATA=shapes|cifar10|folder:PATH] [SCALE=small|medium|full] [ARGS="--only week1_gan"]
exercises: setup
	$(BIN)/python launch/exercises.py --data "$(DATA)" --scale "$(SCALE)" $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 3 --maxschedchunk 1 -m "not long"

# The tests that `make check` leaves out: .ci/run runs both, so that no test runs twice.
slow: setup
	$(BIN)/python -m pytest -n 3 --maxschedchunk 1 -m "slow or long"

# Tests of about a minute each: every engine with every family, more faults, whole benchmarks.
long: setup
	$(BIN)/python -m pytest -n 3 --maxschedchunk 1 -m long

# Inject faults, and check that promises hold: make drill [ARGS="--short"]
drill: setup
	$(BIN)/python -m tests.drills.drill $(ARGS)

# What to run before every commit: style, types, and the tests that are fast.
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 -m "not slow and not long"

bench: setup
	$(BIN)/python launch/benchmark.py data
	$(BIN)/python launch/benchmark.py noise

# A real Slurm cluster of four nodes on this machine, to try jobs and sweeps on.
cluster-up: setup
	$(BIN)/python -m slurm.devcluster up

cluster-down: setup
	$(BIN)/python -m slurm.devcluster down

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
