# Everything runs in .venv, which is made with this interpreter and installed as CONSTRAINTS says.
PYTHON ?= python3
VENV := .venv
DEMO := $(VENV)/bin/performers train demo --output runs/demo --if-exists show
CONSTRAINTS := constraints.txt
INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS)
FUZZ_MINUTES ?= 60
PYTEST := $(VENV)/bin/python -m pytest
OLDEST := .venv-oldest

# Two workers with one thread each: more threads than cores make torch slower, not faster.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-slow fuzz mutants lint format docs package clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: export OMP_NUM_THREADS = $(shell nproc)
demo: $(VENV)/installed-for-use ## train a small Performer on long sequences of proteins and write runs/demo/report.html
	$(DEMO)

test: $(VENV)/installed-for-development ## run the tests, the examples in docstrings included
	$(PYTEST) -n 2

test-oldest: $(OLDEST)/constraints.txt ## run them with the oldest torch and transformers that are supported
	$(MAKE) test VENV=$(OLDEST) CONSTRAINTS=$<

test-slow: $(VENV)/installed-for-development ## run the tests that take long
	$(PYTEST) -n 2 -m slow

fuzz: export HYPOTHESIS_PROFILE = fuzz
fuzz: $(VENV)/installed-for-development ## throw malformed inputs at everything for FUZZ_MINUTES, 60 unless given
	end=$$(( $$(date +%s) + 60 * $(FUZZ_MINUTES) )); \
	while [ $$(date +%s) -lt $$end ]; do $(PYTEST) -n 2 -q --timeout 3600 tests/fuzz || exit 1; done

mutants: $(VENV)/installed-for-development ## see whether the tests notice faults in MODULE=src/performers/…
	$(VENV)/bin/python tests/mutants.py $(MODULE)

lint: $(VENV)/installed-for-development ## check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/installed-for-development ## rewrite the code in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/installed-for-development ## build the documents as a site in build/docs, with links checked
	$(INSTALL) --editable ".[docs]"
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going -c docs . build/docs

package: $(VENV)/installed-for-development ## build the wheel and the sdist into dist/, and check them
	rm -rf dist
	$(INSTALL) --editable ".[release]"
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*

clean: ## remove the environment and the caches; runs/ stays
	rm -rf $(VENV) $(OLDEST) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps say what the environment holds. When one of these two files is newer, it is renewed.
$(VENV)/installed-for-use: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	$(INSTALL) --editable ".[hf,bio,viz]"
	touch $@

$(VENV)/installed-for-development: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/pip
	$(INSTALL) --editable ".[hf,lora,bio,viz,sklearn,triton,onnx,dev]"
	touch $@ $(VENV)/installed-for-use

# Debian's venv module has no ensurepip of its own, so the pip of $(PYTHON) brings the environment's.
$(VENV)/bin/pip:
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet --constraint $(CONSTRAINTS) pip

# The lower bounds in pyproject.toml; all else is as new as these allow. The interpreter of Triton 3.4, which is
# that of torch 2.8, makes numbers of arrays in a way that numpy 2.4 refuses.
$(OLDEST)/constraints.txt: pyproject.toml Makefile
	mkdir -p $(OLDEST)
	sed -nE 's/.*"(torch|transformers)>=([0-9.]+).*/\1==\2/p' $< > $@
	echo 'numpy<2.4' >> $@
