# Every target makes its own environment first; the second run starts in seconds.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Test files are shared out among so many processes, of one thread each: threads that wait for one another would only get in
# the way. WORKERS=1 shows the tests one after the other, in their order.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
PYTEST := $(BIN)/python -m pytest
SHARED = OMP_NUM_THREADS=1 $(PYTEST) $(if $(filter-out 1,$(WORKERS)),-n $(WORKERS) --dist loadfile)

.PHONY: demo test test-slow test-gpu bench lint clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "replknet needs Python 3.11 or newer; $$($(PYTHON) --version) was found. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.demo

# Train on the embedded images, evaluate, merge, draw the effective receptive field, write runs/demo/report.html.
demo: $(VENV)/.demo
	$(BIN)/replknet demo

# Everything that runs in minutes on two cores. ARGS passes options to pytest.
test: $(VENV)/.dev
	$(SHARED) -m 'not slow' $(ARGS)

test-slow: $(VENV)/.dev
	$(SHARED) -m slow $(ARGS)

test-gpu: $(VENV)/.dev
	$(PYTEST) -m gpu $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/replknet bench op

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs
