# `make demo` runs the main job, `make test` all checks. Both set up what they need in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# What is imported is compiled then, and kept; to compile all that is installed takes longer.
export PYTHONDONTWRITEBYTECODE :=
PIP := pip install --quiet --disable-pip-version-check --no-compile
# Quick tests of every part of the library proper, and those of them that are run twice.
CORE_TESTS := $(addprefix tests/, loss_weightings/test_golden.py gramian_weightings/test_solved.py \
	test_tasks.py test_transforms.py test_train.py test_representation.py test_interop.py)
QUICK_TESTS := $(CORE_TESTS) $(addprefix tests/, gramian_weightings/test_surgery.py \
	gradient_aggregators/test_golden.py gradient_weightings test_methods.py test_wrappers.py \
	test_masking.py test_diagnostics.py test_evaluation.py test_evaluation_pareto.py)
# What has the extra `test` has every extra.
installed = $(firstword $(wildcard $(VENV)/installed-test) $(VENV)/installed-$(1))

.NOTPARALLEL:
.PHONY: demo docs tables notebook test check test-lowest setup clean

demo: $(call installed,experiments)
	$(BIN)/python -m experiments.compare --resume

# The documentation, into docs/_build: open docs/_build/index.html.
docs: $(call installed,docs)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

# The tables of methods in README.md and docs, from mtl_jax/methods.py.
tables: $(call installed,docs)
	$(BIN)/python docs/tables.py

# Executes the script again; its outputs are kept in the notebook.
notebook: $(VENV)/installed-test
	$(BIN)/python .ci/notebook.py examples/diagnosis.py

test: $(VENV)/installed-test $(VENV)/chromium/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project examples
	$(BIN)/python -m pytest -n auto -q
	$(MAKE) test-lowest

# While working on the library: lint, types and the quick tests.
check: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -n auto -q $(QUICK_TESTS)

# The library alone, as a wheel, with the oldest versions that pyproject.toml allows.
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/$(PIP) --force-reinstall --no-deps --no-build-isolation .
	$(LOWEST)/bin/pip check --disable-pip-version-check
	$(LOWEST)/bin/python .ci/check_installed.py
	$(LOWEST)/bin/python -m pytest -n auto -q $(CORE_TESTS)

setup: $(VENV)/installed-test

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-%: pyproject.toml | $(BIN)/pip
	$(BIN)/$(PIP) --editable '.[$*]'
	touch $@

# The browser that the tests open pages with.
$(VENV)/chromium/installed: tests/chromium.py | $(VENV)/installed-test
	$(BIN)/python tests/chromium.py
	touch $@

$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/$(PIP) hatchling hatch-fancy-pypi-readme pytest pytest-xdist hypothesis \
		$$($(PYTHON) .ci/lowest_versions.py)
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) docs/_build runs
