# Two commands do everything: `make run` serves the default model, `make test` proves the tree.
# Both create .venv with $(PYTHON) and install into it; outside this folder only the user's model store and cache change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Servers start some hundred times in the tests; without bytecode each start and each worker compiles every module again.
export PYTHONDONTWRITEBYTECODE :=
# The exit code of a part of the tests in which ARGS may select nothing; without ARGS each has some.
NONE := $(if $(ARGS),5,0)

.PHONY: run test lint types full clean

run: $(VENV)/installed
	$(BIN)/ocserve run $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m 'not alone' -n 3 --dist loadfile --no-loadscope-reorder $(ARGS) || [ $$? -eq $(NONE) ]
	$(BIN)/pytest -m alone $(ARGS) || [ $$? -eq $(NONE) ]

# The slow proofs with their full figures; takes much longer than `make test`.
full: $(VENV)/installed-test
	$(BIN)/pytest --full $(ARGS)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing; llama.cpp is compiled once, which takes five to twelve minutes on two cores.'
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
