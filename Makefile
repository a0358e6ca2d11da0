# make demo   install, convert the embedded checkpoint, check what came out
# make test   install, then lint, types, import contract, tests
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

# make test-vllm   load the embedded checkpoint's FP8 in vLLM, in an environment of its own
.PHONY: help setup demo test test-all test-vllm lint bench clean

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its exact version, so that pip takes a CPU build where one is at hand
$(VENV)/.setup: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --editable '.[nf4]'
	touch $@

$(VENV)/.test: $(VENV)/.setup
	$(PIP) install --quiet --editable '.[nf4,test]'
	touch $@

setup: $(VENV)/.setup

demo: setup
	$(BIN)/python demo/demo.py

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not heavy'

test-all: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# vLLM pins its own transformers, so it has an environment of its own
$(VLLM)/.made: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	PIP_CONSTRAINT= $(VLLM)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PIP_CONSTRAINT= $(VLLM)/bin/python -m pip install --quiet -r tests/vllm/requirements.txt
	$(VLLM)/bin/python tests/vllm/mend.py
	touch $@

test-vllm: $(VENV)/.test $(VLLM)/.made
	mkdir -p build/vllm
	$(BIN)/python tests/vllm/references.py build/vllm
	$(VLLM)/bin/python tests/vllm/compare.py build/vllm

bench: $(VENV)/.test
	$(BIN)/python benchmarks/nf4.py
	$(BIN)/python benchmarks/fp8.py

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
