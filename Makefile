# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One process a core; `make test SIDE_BY_SIDE=` runs one test after another.
SIDE_BY_SIDE ?= -n auto --maxprocesses 8 --dist worksteal

# The kernels' tests, on a CPU by Triton's interpreter, which wants an older numpy: both lie beside
# the environment. Triton is there for Linux on x86-64 and AArch64.
KERNELS := $(VENV)/kernels
KERNEL_TESTS := $(wildcard tests/*/test_*_kernels.py) tests/float8/test_float8_transpose.py

.PHONY: demo test lint types test-kernels test-slow test-thirdparty docs clean

demo: $(VENV)/.base
	$(BIN)/mixprec demo $(ARGS)

test: $(VENV)/.test lint types docs test-kernels
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-kernels: $(KERNELS)/.made
	if [ -d $(KERNELS)/triton ]; then \
	    TRITON_INTERPRET=1 PYTHONPATH=$(KERNELS) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -q \
	        -W "ignore:Conversion of an array with ndim:DeprecationWarning" $(KERNEL_TESTS); \
	else echo "kernels not tested: no Triton for this platform"; fi

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright --pythonpath $(BIN)/python

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow $(ARGS)

test-thirdparty: $(VENV)/.thirdparty
	$(BIN)/python -m pytest -m thirdparty $(ARGS)

# -E reads every page anew: Sphinx does not warn again of one that it has kept.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -E -W --keep-going -b html docs docs/_build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by its pinned version: a bare "torch" may fetch gigabytes of CUDA packages.
$(VENV)/.base: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

$(KERNELS)/.made: $(VENV)/.test
	case "$$(uname -sm)" in \
	    "Linux x86_64" | "Linux aarch64") $(BIN)/python -m pip install --quiet --no-deps \
	        --target $(KERNELS) triton==3.6.0 numpy==2.3.5 ;; \
	    *) mkdir -p $(KERNELS) ;; \
	esac
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.thirdparty: $(VENV)/.test
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,thirdparty]'
	touch $@

clean:
	rm -rf $(VENV) docs/_build
