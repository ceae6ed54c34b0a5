# make demo: fuse three drawn phantom pairs.  make test: ruff and pytest.
# make test-all: the tests of minutes and gigabytes, too.
# Each first makes a virtual environment in .venv and installs what is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all clean

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

.venv/dev: $(wildcard requirements-*.txt) .venv/run
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/run
	$(BIN)/python test_asfe.py --demo

test: TESTS := not slow
test-all: TESTS := slow or not slow
test test-all: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "alone and ($(TESTS))"
	$(BIN)/python -m pytest -m "not alone and ($(TESTS))" -n auto --maxprocesses 8 --dist loadfile

clean:
	rm -rf .venv .pytest_cache .ruff_cache
