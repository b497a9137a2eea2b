# make quickstart   install into .venv, then train and compare both heads on embedded real digits
# make test         install into .venv, then lint, type check and test
# make docs         install into .venv, then build the documentation into site/
# make crash-test   kill runs of every source and continue them; KILLS=30 SEED=0
# make fuzz         losses and gradients beside an 80-bit reference; SECONDS=60 SEED=0
# Other targets: lint, pytest, coverage, test-slow, format, notebooks, linkcheck.
# Other Pythons and versions, Colab, peers and mutants: `uvx nox --list`.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# uv installs in seconds what takes pip minutes.
INSTALL = $(if $(shell command -v uv),uv pip install -q --python $(VENV)/bin/python,$(VENV)/bin/pip install -qq)
PYTEST_ARGS ?=
# Compiling is most of a test's work and keeps about one core busy.
JOBS ?= 2
KILLS ?= 30
SECONDS ?= 60
SEED ?= 0
# The JSON file that crash-test and fuzz write, such as experiments/results/reliability/fuzz.json.
RESULT ?=

.DELETE_ON_ERROR:
.PHONY: quickstart test docs linkcheck lint pytest coverage test-slow crash-test fuzz format notebooks

quickstart: $(VENV)/experiments.stamp
	$(VENV)/bin/python -m experiments quickstart

test: lint pytest

docs: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -W --keep-going -q -d $(VENV)/doctrees docs site
	@echo "site/index.html written"

# Asks every link to another site, so it needs the network.
linkcheck: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -b linkcheck -q docs site/linkcheck

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pytest: $(VENV)/test.stamp
	$(VENV)/bin/pytest -n $(JOBS) --dist worksteal $(COVERAGE) $(PYTEST_ARGS)

coverage: COVERAGE = --cov=lsoftmax_jax --cov-report=term:skip-covered
coverage: pytest

test-slow: PYTEST_ARGS = -m slow
test-slow: pytest

# The second command kills one of two processes that train together.
crash-test: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m scripts.crash --kills $(KILLS) --seed $(SEED) $(if $(RESULT),--result $(RESULT))
	$(VENV)/bin/pytest -m slow -k lost_process tests/experiments/store/test_processes.py

fuzz: $(VENV)/test.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m scripts.fuzz --seconds $(SECONDS) --seed $(SEED) $(if $(RESULT),--result $(RESULT))

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The notebooks from the scripts beside them; outputs of unchanged cells stay.
notebooks: $(VENV)/test.stamp
	$(VENV)/bin/jupytext --update --to ipynb experiments/notebooks/*.py

# The stamp's name is the extra of pyproject.toml that is installed.
$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit( \
	    "$(PYTHON) is Python %d.%d, expected 3.11 to 3.13: make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing .[$*] into $(VENV); the first time takes a few minutes."
	$(INSTALL) --constraint $(CONSTRAINTS) --editable ".[$*]"
	touch $@
