# Two commands do everything: `make run` serves the default model, `make test` proves the tree.
# Both create .venv with $(PYTHON) and install into it; nothing outside this folder changes but the user's model store.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test lint types full clean

run: $(VENV)/installed
	$(BIN)/ocserve run $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest $(ARGS)

# The slow proofs with their full figures; takes much longer than `make test`.
full: $(VENV)/installed-test
	$(BIN)/pytest --full $(ARGS)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
