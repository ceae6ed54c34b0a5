# make demo: fuse three drawn phantom pairs.  make test: ruff and pytest.
# Both first make a virtual environment in .venv and install what is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: $(wildcard requirements-*.txt) .venv/run
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(BIN)/python test_asfe.py --demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv .pytest_cache .ruff_cache
