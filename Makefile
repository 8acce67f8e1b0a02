# `make demo`, `make demo-language` and `make test` need Python >= 3.11 with its venv module, and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-language test lint types slow clean

# the stamp is newer than pyproject.toml once everything it lists is installed
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is wanted, this is {sys.version}")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m experiments.backdoor --dataset=digits --workdir=runs/demo

demo-language: .venv/installed
	$(BIN)/python -m experiments.language --workdir=runs/demo-language

test: lint types
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/pyright

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf .venv runs build *.egg-info
