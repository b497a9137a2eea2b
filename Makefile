# make quickstart   install into .venv, then train and compare both heads on embedded real digits
# make test         install into .venv, then lint, type check and test
# make docs         install into .venv, then build the documentation into site/
# make crash-test   kill runs of every source and continue them; KILLS=30 SEED=0
# make fuzz         losses and gradients beside an 80-bit reference; SECONDS=60 SEED=0
# make mutation     changes the library in so many places, and counts what its tests miss; SAMPLE=400
# Other targets: coverage, linkcheck, lint, pytest, test-slow, test-lowest, test-newest, test-stacks,
# notebooks-colab, parity, compile-gpu, format, notebooks, constraints.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# uv, where it is on the path, takes seconds for what pip takes minutes for.
INSTALL = $(if $(shell command -v uv),uv pip install -q --python $(VENV)/bin/python,$(VENV)/bin/pip install -qq)
PYTEST_ARGS ?=
STACKS_ARGS ?=
# Test processes, each with its share of the files, whose tests share compiled programs, until one is
# done and takes from the other. Compiling is most of the work and keeps about one core busy.
JOBS ?= 2

.DELETE_ON_ERROR:
.PHONY: quickstart test coverage docs linkcheck lint pytest test-slow test-lowest test-newest \
    test-stacks notebooks-colab parity compile-gpu crash-test fuzz format notebooks constraints

quickstart: $(VENV)/experiments.stamp
	$(VENV)/bin/python -m experiments quickstart

test: lint pytest

# Counting lines makes the tests' Python half as slow again.
coverage: COVERAGE = --cov=lsoftmax_jax --cov-report=term:skip-covered
coverage: pytest

docs: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -W --keep-going -q docs site
	@echo "site/index.html written"

# Asks every link to another site; needs the network.
linkcheck: $(VENV)/docs.stamp
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m sphinx -b linkcheck -q docs site/linkcheck

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

pytest: $(VENV)/test.stamp
	$(VENV)/bin/pytest -n $(JOBS) --dist worksteal $(COVERAGE) $(PYTEST_ARGS)

test-slow:
	$(MAKE) pytest PYTEST_ARGS="-m slow"

# The stamp's name is the extra it stands for.
$(VENV)/%.stamp: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit( \
	    "$(PYTHON) is Python %d.%d, expected 3.11 to 3.13: make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing .[$*] into $(VENV); the first time takes a few minutes."
	$(INSTALL) --constraint $(CONSTRAINTS) --editable ".[$*]"
	touch $@

# The suite at the lowest declared versions, and at the newest there are.
test-lowest: .venv-lowest/pins.txt
	$(MAKE) pytest VENV=.venv-lowest CONSTRAINTS=.venv-lowest/pins.txt

test-newest:
	$(MAKE) pytest VENV=.venv-newest CONSTRAINTS=/dev/null

# The suite on Colab's JAX, on the pinned one and on the newest, each with its Python; what came out
# goes into stacks/results.json. STACKS_ARGS="--core colab" runs the library's tests on one of them.
test-stacks:
	$(PYTHON) scripts/stacks.py $(STACKS_ARGS)

# The notebooks in what Colab's runtime holds, installation included; into stacks/notebooks.json.
notebooks-colab:
	PYTHONPATH=. $(PYTHON) scripts/colab.py $(STACKS_ARGS)

.venv-lowest/pins.txt: pyproject.toml scripts/lowest.py
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -qq packaging
	.venv-lowest/bin/python scripts/lowest.py pyproject.toml > $@

# Loss, gradients and weights beside those of PyTorch and Keras; what it measures is a result. Not with the pins, whose
# mpmath is newer than what PyTorch asks for.
parity:
	$(MAKE) .venv-parity/test,peers.stamp VENV=.venv-parity CONSTRAINTS=/dev/null
	PARITY_JSON=experiments/results/parity/pytorch-metric-learning.json \
	    .venv-parity/bin/pytest tests/lsoftmax_jax/test_peers.py tests/lsoftmax_jax/test_keras.py

# What the compilers for GPUs make of the heads; 5.6 GB to install, no GPU needed.
compile-gpu: $(VENV)/experiments,aot-gpu.stamp
	$(VENV)/bin/python -m experiments compile --targets h100 h200 a100 b200 --no-steps

format:
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The notebooks, from the scripts beside them.
notebooks: $(VENV)/test.stamp
	$(VENV)/bin/python scripts/notebooks.py experiments/notebooks

# Pin what a fresh install of the test extra resolves to. They hold for make and CI, not for users.
constraints:
	$(PYTHON) -m venv --clear .venv-constraints
	.venv-constraints/bin/pip install -qq --editable ".[test]"
	.venv-constraints/bin/pip freeze --exclude-editable > constraints.txt

KILLS ?= 30
SECONDS ?= 60
SEED ?= 0
SAMPLE ?= 400
# A file for what was found, such as experiments/results/reliability/fuzz.json.
RESULT ?=
.PHONY: crash-test fuzz mutation
# Then two processes, one of which is killed.
crash-test: $(VENV)/test.stamp
	PYTHONPATH=. JAX_PLATFORMS=cpu $(VENV)/bin/python scripts/crash.py $(KILLS) $(SEED) $(RESULT)
	$(VENV)/bin/pytest -m slow -k lost_process tests/experiments/store/test_processes.py

fuzz: $(VENV)/test.stamp
	PYTHONPATH=. JAX_PLATFORMS=cpu $(VENV)/bin/python scripts/fuzz.py $(SECONDS) $(SEED) $(RESULT)

# A stopped run goes on; AGAIN=1 repeats the mutants that survived.
mutation:
	$(MAKE) .venv-mutation/mutation.stamp VENV=.venv-mutation
	PYTHONPATH=. JAX_PLATFORMS=cpu .venv-mutation/bin/python scripts/mutation.py \
	    $(SAMPLE) $(SEED) $(JOBS) $(RESULT)
