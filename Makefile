# Two commands for a newcomer: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg
# mkdocs-material prints an announcement otherwise
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test check docs bench faults clean

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## install, then cut a ViT that comes with vitrim to half its size
	rm -rf vitrim-demo
	$(BIN)/vitrim demo --out vitrim-demo

# One process a core, one thread a process: tiny models gain nothing from more threads.
test: check  ## install, lint, type-check, build the docs, run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --cov --cov-report=term

check: $(VENV)/.test  ## everything but the tests: format, lint, types, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/site

docs: $(VENV)/.test  ## serve the documentation on localhost
	$(BIN)/mkdocs serve

bench: $(VENV)/.test  ## the numbers in the README; needs ../shared
	$(BIN)/python benchmarks/recovery.py

faults: $(VENV)/.test  ## hostile files and failing disks, many of each; writes docs/reliability.md; Linux, needs cc
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

clean:
	rm -rf $(VENV) vitrim-demo build dist site
