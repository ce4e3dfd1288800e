# make demo   the whole way on this machine: photographs, training, S3, bulk and online grading
# make test   formatting, types, import rules, and the tests
# make quick  the same without the tests that kill workers, nodes, drivers and graders
# make slow   what takes minutes each: whole clusters, outages, searches, benchmarks, the commands of README and docs
#
# All of them set up what they need in .venv from requirements.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Many tests wait: for processes that start, for Ray to notice a loss. Two files at a time fill two cores.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick slow lint browser lock clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@echo "installing into $(VENV) (two minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup
	@$(BIN)/scalp demo --out runs/demo

test: setup lint browser
	@$(BIN)/pytest $(TWO)

quick: setup lint browser
	@$(BIN)/pytest $(TWO) --ignore tests/faults

slow: setup
	@$(BIN)/pytest -m slow

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# The page is tested in Debian's Chromium; the font shows Korean in the screenshots.
browser:
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-nanum; }

# The matched pair of torch and torchvision is pinned under [tool.uv] in pyproject.toml. The second file is the part of
# the first that cluster/Containerfile installs: no tools of tests or benchmarks.
UV_COMPILE := uv pip compile pyproject.toml --generate-hashes --python-version 3.11 --no-emit-index-url --no-header \
	--no-annotate --quiet

lock: setup
	@$(BIN)/pip install --quiet uv
	@$(BIN)/$(UV_COMPILE) --all-extras --upgrade --output-file requirements.lock
	@$(BIN)/$(UV_COMPILE) --extra mlflow --constraint requirements.lock --upgrade --output-file requirements-run.lock

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache
