# Two commands are the whole set-up on a fresh machine:
#   make demo    installs into .venv and runs the main job
#   make test    installs into .venv and runs ruff, mypy and pytest
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow bench clean

demo: .venv/installed
	$(BIN)/svdexpert demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto

slow: .venv/installed
	$(BIN)/python -m pytest -m slow

bench: .venv/installed
	$(BIN)/python -m benchmarks.speed

# torch goes first and alone, so that its pinned version is settled before anything else asks for "some torch".
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,harbor,peers]"
	touch $@

clean:
	rm -rf .venv runs
