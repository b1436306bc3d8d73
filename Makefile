PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint

demo: .venv/installed
	$(BIN)/python -m scripts demo

test: .venv/installed lint
	$(BIN)/python -m pytest
	$(BIN)/python -m scripts verify

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@
