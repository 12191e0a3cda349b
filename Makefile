# make demo   adapt, train, fuse, verify and unfuse a really pretrained model, from nothing
# make test   the whole suite, from nothing
# make lint   ruff and pyright
# make bench  the benchmarks behind benchmarks/RESULTS.md, with a model of 300 million parameters
#
# PYTHON=python3.12 chooses the interpreter that the virtual environment is made with.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format bench clean

# Waiting threads that sleep, not spin, leave a busy machine twice as fast.
demo: $(VENV)/.demo
	@OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 $(BIN)/python examples/demo

# One thread a process: two pytest workers then share two cores instead of fighting for them.
test: $(VENV)/.dev
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev
	@$(BIN)/python benchmarks/unfuse.py
	@test -d build/bench-300m || $(BIN)/python benchmarks/models.py build/bench-300m --size 300m
	@$(BIN)/python benchmarks/fuse_files.py build/bench-300m

clean:
	rm -rf demo-out .pytest_cache .ruff_cache .hypothesis

# The stamps make every later run start at once; a change of the dependencies renews them.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) (torch is the large part; once only)"
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV) with the tools of the tests (once only)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(BIN)/python:
	@$(PYTHON) -c '$(CHECK)' || { echo "Choose another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

CHECK := import sys; sys.version_info >= (3, 10) or \
  sys.exit("Graft needs Python 3.10 or later; " + sys.executable + " is " + sys.version.split()[0])
