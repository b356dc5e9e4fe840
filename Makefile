# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo    sets everything up, then slims the embedded example with every method
#   make test    sets everything up, then runs linters, types and the default tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Small tensors come and go: what is freed stays with the process, which halves the system's share.
KEPT := MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=2000000000
# Byte code of tests and sources stays too, even where this variable forbids it: making it anew takes
# every process four seconds.
KEPT += PYTHONDONTWRITEBYTECODE=

# The site of the documents; a dead link or any other warning is an error. The variable silences an advertisement.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The default tests run in an order drawn with this seed, so that none leans on another:
# make test SEED=7 draws another one.
SEED ?= 1
EVERY ?= 1

.PHONY: demo test test-slow test-hostile test-oldest test-gpu attack tables picture docs format constraints clean

demo: $(VENV)/.ready
	$(BIN)/patchslim demo --out runs/demo

test: $(VENV)/.compiled
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/tables.py --check
	$(BIN)/python benchmarks/golden_macs.py
	$(SITE) --quiet
	$(KEPT) $(BIN)/pytest -n 2 --dist worksteal --shuffle $(SEED)

# Everything that takes longer: compilers, big variants, real weights and images.
test-slow: $(VENV)/.compiled
	$(KEPT) $(BIN)/pytest -m slow -n 2 --dist worksteal --shuffle $(SEED)

# Every hostile input, and long commands stopped at any moment, or at one in EVERY of those. They train in forked processes, which
# PyTorch refuses where other tests have used its threads, so that they run by themselves.
test-hostile: $(VENV)/.compiled
	$(BIN)/pytest -m hostile --every $(EVERY) -n 2 --dist worksteal tests/test_attacks.py tests/test_interruptions.py

# Every hostile input, with five figures for each kind: what was tried, and four sorts of fault.
attack: $(VENV)/.ready
	cd tests && $(abspath $(BIN))/python -m attacks

# The laws and reference numbers on the oldest supported torch, timm and transformers.
test-oldest: $(VENV)-oldest/.ready
	$(VENV)-oldest/bin/pytest -n 2 tests/test_*laws.py tests/test_places.py tests/test_reference.py \
	  tests/test_refused_hosts.py tests/test_measured_costs.py tests/test_schedules.py tests/test_macs.py \
	  tests/test_train.py tests/test_checkpoint.py

$(VENV)-oldest/.ready: pyproject.toml constraints-oldest.txt $(VENV)/.ready
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(BIN)/uv pip install --quiet --python $(VENV)-oldest/bin/python -c constraints-oldest.txt -e ".[dev]"
	@touch $@

# The laws on a GPU; skipped without one.
test-gpu: $(VENV)/.compiled
	$(BIN)/pytest -m gpu

# The tables in README and docs, from the rows in benchmarks/results.
tables: $(VENV)/.ready
	$(BIN)/python benchmarks/tables.py

# The picture in README, from the embedded example.
picture: $(VENV)/.ready
	$(BIN)/python benchmarks/picture.py

# The site, in site/index.html. It stops at a dead link or any other warning, and needs no network.
docs: $(VENV)/.ready
	$(SITE) --quiet
	@echo "site/index.html"

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Both commands build this same environment, from pinned versions.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("patchslim needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name a newer one: make PYTHON=python3.12 demo")'
	@$(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; free > 8 or sys.exit("%.1f GB are free here; PyTorch and its libraries need about 8 GB." % free)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev,executorch]"
	@touch $@

# Tests start hundreds of processes. Each would compile PyTorch's sources anew where the variable
# PYTHONDONTWRITEBYTECODE is set, since uv compiles nothing.
$(VENV)/.compiled: $(VENV)/.ready
	-@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1
	@touch $@

constraints: $(VENV)/.ready
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --quiet --upgrade -o constraints.txt

clean:
	rm -rf $(VENV) runs build dist site .mypy_cache .ruff_cache .pytest_cache
