# Two commands for a newcomer: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Pins hold for the system and Python they were made on; where the file is missing, pip takes the newest.
LOCK := requirements/$(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c \
	'import sysconfig as s; print(s.get_platform(), s.get_python_version(), sep="-")').txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLBACKEND := Agg

# Not in the lock: torch and what comes with it belong to the machine, setuptools to the virtual environment.
UNPINNED := ^(vitrim|setuptools|torch|torchvision|triton|nvidia-.*|cuda-.*)==

# docs/reliability.md says why
NOT_WITH_OLDEST := int8 or shards or torch_compile or table_in_the_docs or (every_form and True-torch) or silent_nothing

.PHONY: demo test anywhere check docs bench faults lock audit oldest transformers4 litert clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(wildcard $(LOCK)) | $(BIN)/python
	$(BIN)/pip install --quiet $(addprefix --constraint=,$(wildcard $(LOCK))) --editable '.[test]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## install, then cut a ViT that comes with vitrim to half its size
	rm -rf vitrim-demo
	$(BIN)/vitrim demo --out vitrim-demo --overwrite  # a demo that was stopped begins anew

# One process a core, one thread a process: tiny models gain nothing from more threads.
test: check  ## install, lint, type-check, build the docs, run a few tests elsewhere, and then every test here
	$(BIN)/python -m tests.support.anywhere --part
	OMP_NUM_THREADS=1 $(BIN)/python -m slipcover --source vitrim --omit 'vitrim/assets/*' --skip-covered \
		-m pytest -n auto --maxprocesses 8 --dist loadfile

anywhere: $(VENV)/.test  ## the quick tests in a copy at another path, in an environment by a seed: make anywhere SEED=7
	$(BIN)/python -m tests.support.anywhere $(addprefix --seed=,$(SEED))

check: $(VENV)/.test  ## everything but the tests: format, lint, types, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/zensical build --clean --strict  # what it cached, it does not warn of again

docs: $(VENV)/.test  ## serve the documentation on localhost
	$(BIN)/zensical serve

bench: $(VENV)/.test  ## the numbers in the README; needs ../shared
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/headline.py --write

faults: $(VENV)/.test  ## hostile files and failing disks, many of each; writes docs/reliability.md; Linux, needs cc
	-$(BIN)/pip install --quiet --editable '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

lock: | $(BIN)/python  ## pin the newest versions that go together, for `make test` on this system and Python
	$(BIN)/pip install --quiet --dry-run --ignore-installed --report $(VENV)/lock.json '.[test]'
	$(BIN)/python -c 'import json; print(*sorted(("{name}=={version}".format_map(item["metadata"]) for item in \
		json.load(open("$(VENV)/lock.json"))["install"]), key=str.lower), sep="\n")' \
		| grep -vE '$(UNPINNED)' > $(LOCK)

audit:  ## look for known vulnerabilities in the lock; asks the package index
	test -x $(VENV)/audit/bin/pip-audit || $(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	@$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement $(LOCK) || { echo 'make audit: FAILED.' \
		'Where no table stands above, the package index did not answer for a package: nothing was audited.' >&2; exit 1; }

oldest:  ## run the tests with the oldest versions that vitrim allows; Python 3.11
	test -x $(VENV)/oldest/bin/python || $(PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/pip install --quiet --requirement requirements/oldest.txt
	$(VENV)/oldest/bin/pip install --quiet --no-deps --editable .
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -W default -n auto --maxprocesses 8 --dist loadfile \
		--ignore tests/test_parallel.py -k 'not ($(NOT_WITH_OLDEST))'

transformers4: $(VENV)/.test  ## which versions 4 of transformers load what vitrim writes; makes environments in .cache
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/transformers4.py

litert:  ## the tests of export with LiteRT, whose packages don't go with the lock; makes an environment in .cache
	test -x .cache/litert/bin/python || $(PYTHON) -m venv .cache/litert
	.cache/litert/bin/pip install --quiet --editable '.[test,litert]'
	OMP_NUM_THREADS=1 .cache/litert/bin/python -m pytest -q -W default tests/test_export.py

clean:
	rm -rf $(VENV) vitrim-demo build dist site .cache
