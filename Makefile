# Each target sets up what it needs in .venv from requirements.lock. `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Without bytecode, importing PyTorch and Ray takes each process twice as long. Images of Python often forbid to write it.
unexport PYTHONDONTWRITEBYTECODE
# Code that no command imports, a third of all: packages' own tests, and what only parts of packages need.
UNUSED := site-packages/(.*/)?(tests|testing|alembic|backrefs|daft|databricks|fhir|fontTools|graphql|llm|mypyc?|physics|pip|pyasn1_modules|pygments|pymdownx|rllib|sqlalchemy)/

# Two files at a time fill two cores. The slowest tests are listed at the end.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 --durations-min 3 $(ARGS)
FAST   := tests/docs tests/jobs tests/serving tests/cluster tests/scalp_core
QUICK  := -m "not medium and not slow and not nightly"
TESTS  :=

.DEFAULT_GOAL := help
.PHONY: help setup demo fast test tests nightly lint docs pictures browser lock sbom clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/make \1\t/p' Makefile | expand -t 16
	@echo
	@echo "one test:       .venv/bin/pytest tests/scalp_core/test_grades.py -k every_name"
	@echo "the last fails: .venv/bin/pytest --lf;  options of pytest: make fast ARGS=-x"

setup: $(READY)  ## install the locked packages into .venv

# uv installs in a sixth of pip's time. It does not read pip's settings: with a mirror that only pip knows, pip installs.
$(READY): requirements.lock pyproject.toml
	@echo "installing into $(VENV) (a minute the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.txt
	@$(BIN)/pip install --quiet --require-hashes --no-deps -r $(VENV)/uv.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps \
		-r requirements.lock || { \
		echo "uv could not install (above); pip tries, which takes minutes"; \
		$(BIN)/pip install --quiet --require-hashes --no-deps -r requirements.lock; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --offline --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' $(VENV)/lib/python3*/site-packages || true  # templates fail
	@touch $@

demo: setup  ## the whole way on this machine: synthetic images, training, S3, bulk and online grading
	@$(BIN)/scalp demo --out runs/demo

# Type checks use one core, and tests wait: side by side they take less time.
fast: setup  ## lint, and tests without Ray that take less than half a second each
	@$(MAKE) --no-print-directory --jobs 2 lint tests TESTS='$(QUICK) $(FAST)'

test: setup  ## all that a change must pass; without Chromium the browser tests are skipped
	@$(MAKE) --no-print-directory --jobs 2 lint tests

tests: setup
	@$(PYTEST) $(TESTS)

nightly: setup browser  ## what takes minutes each: kills, outages, clusters, benchmarks, commands of the docs
	@$(PYTEST) -m "slow or nightly"
	@$(PYTEST) --hypothesis-profile=nightly $$(grep -rl --include='*.py' 'support.examples import' tests)
	@seed=$$(date +%Y%m%d); echo "random order: make fast ARGS='--order $$seed'"; $(PYTEST) --order $$seed $(FAST)

lint: setup  ## formatting, types, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: setup  ## generate references, tables and charts of docs/, and build the site in build/site
	@$(BIN)/python tests/docs/module_tables.py
	@$(BIN)/python -m tests.docs.references
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pictures: setup browser  ## draw the pictures of README and docs; needs the bundle of `make demo`
	@$(BIN)/python -m tests.docs.pictures

# The page is tested in Debian's Chromium; the font shows Korean in the screenshots.
browser:  ## install Debian's Chromium, for the tests of the page
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-nanum; }

# The matched pair of torch and torchvision is pinned under [tool.uv] in pyproject.toml. The first file holds for every
# platform, by markers; the second is the part of it that cluster/Containerfile installs: no tools of tests or benchmarks.
UV_COMPILE := uv pip compile pyproject.toml --generate-hashes --python-version 3.11 --no-emit-index-url --no-header \
	--no-annotate --quiet

lock: setup  ## update requirements.lock
	@$(BIN)/$(UV_COMPILE) --universal --all-extras --upgrade --output-file requirements.lock
	@$(BIN)/$(UV_COMPILE) --extra clinical --extra mlflow --extra offline-weights --extra otlp \
		--constraint requirements.lock --upgrade --output-file requirements-run.lock

# Reproducible: without times and random numbers, so that two bills of the same lock are equal.
SBOM := python -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible --spec-version 1.6

sbom: setup  ## bills of materials (CycloneDX) of the locked packages, in build/
	@mkdir -p build
	@$(BIN)/$(SBOM) --output-file build/sbom.json requirements.lock
	@$(BIN)/$(SBOM) --output-file build/sbom-run.json requirements-run.lock

clean:  ## remove .venv and caches
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .pytest_cache
