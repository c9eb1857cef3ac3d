# `make demo` runs the main job, `make test` all checks. Both set up what they need in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
CORE_TESTS := $(addprefix tests/, loss_weightings/test_golden.py gramian_weightings/test_solved.py \
	test_tasks.py test_transforms.py test_train.py test_representation.py test_interop.py)

.PHONY: demo docs notebook test test-lowest setup clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.compare --resume

# The documentation, into docs/_build: open docs/_build/index.html.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

# Executes the script again; its outputs are kept in the notebook.
notebook: $(VENV)/installed
	$(BIN)/python .ci/notebook.py examples/diagnosis.py

test: $(VENV)/installed $(VENV)/chromium/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python --project examples
	$(BIN)/python -m pytest -n auto -q
	$(MAKE) test-lowest

# The library alone, as a wheel, with the oldest versions that pyproject.toml allows.
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
		--no-build-isolation .
	$(LOWEST)/bin/pip check --disable-pip-version-check
	$(LOWEST)/bin/python .ci/check_installed.py
	$(LOWEST)/bin/python -m pytest -n auto -q $(CORE_TESTS)

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# The browser that the tests open pages with.
$(VENV)/chromium/installed: tests/chromium.py | $(VENV)/installed
	$(BIN)/python tests/chromium.py
	touch $@

$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check \
		hatchling pytest pytest-xdist hypothesis $$($(PYTHON) .ci/lowest_versions.py)
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) docs/_build runs
