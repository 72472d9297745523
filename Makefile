# Every target works in a fresh clone: the first one to run makes .venv and installs the package into it, with the
# versions that the tests ran with. Later runs install again only when pyproject.toml or constraints.txt changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test test-slow lint format types bench docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Learns, indexes, answers, explains: a retriever on the texts of this machine. Minutes, no downloads. By default the tour
# of mistral-splade; FAMILY=colbert-xm, FAMILY=lexinvariant and FAMILY=tokenizer-transplant are the others.
quickstart: $(INSTALLED)
	$(BIN)/rarezoo quickstart $(FAMILY)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A type checker does not see an editable install whose folders carry other names than the package, so it is given what
# users get: the package as the wheel installs it. The wheel is built from the sdist, never from a stale build folder.
types: $(INSTALLED)
	rm -rf build/types
	$(BIN)/python -m build --no-isolation --outdir build/types . > /dev/null
	$(BIN)/python -m pip install --quiet --no-deps --target build/types/installed build/types/*.whl
	MYPYPATH=build/types/installed $(BIN)/python -m mypy --package rarezoo

bench: $(INSTALLED)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
