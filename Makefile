# make book: build the book.  make test: check everything.  `make help` lists the rest.

# The tiers of tests: .ci/run runs `make test`, a weekly workflow all of them. Budgets are for 2 cores, after the install:
# 20 minutes for `make test`, which needs no network then; 45 for each of the others.
TIERS := test zoo mutants browser oldest colab-resolve links

PYTHON ?= python3
# for the tiers of these names: the oldest supported Python, and Colab's
OLDEST_PYTHON ?= python3.11
COLAB_PYTHON ?= python3.13
BIN := .venv/bin
ROOT ?=
# empty: the newest versions that requirements.txt allows
CONSTRAINTS ?= constraints.txt
export OMP_NUM_THREADS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 120 --nbval-sanitize-with tests/nbval_sanitize.cfg
# Printed numbers are compared with tolerance (tests/nbval_tolerance.py); STOCK=1: as nbval alone does it, digit for digit.
STOCK ?=
NBVAL += $(if $(STOCK),,-p nbval_tolerance)

.PHONY: help book lint unit nbval notebooks bench train clean $(TIERS)

help:
	@echo "make book       build the book from the committed notebooks and print the file to open"
	@echo "make test       lint, book, unit tests, and every notebook executed and compared with its stored outputs"
	@echo "make lint       style, types and notebook lint only;  make unit: only that part"
	@echo "make nbval      the notebooks only, executed and compared;  STOCK=1: digit for digit, without tolerance"
	@echo "make notebooks  execute all notebooks anew, in place"
	@echo "make bench      print the benchmark tables"
	@echo "make train      train the shipped networks anew; ROOT=folder of the original Fashion-MNIST files (default: download)"
	@echo "make clean      remove what was built; the environments stay"
	@echo
	@echo "The tiers of tests besides make test:"
	@echo "make zoo            find, explain, mask and compact 104 networks (WRITE=1: store it, write the page of the book)"
	@echo "make mutants        apply one-line faults to the package, one at a time: tests must fail each time"
	@echo "make browser        every page of the built book in headless Chromium: console, width, weight, accessibility"
	@echo "make oldest         unit tests, the longest too, on the oldest versions that requirements.txt allows"
	@echo "make colab-resolve  what an install would change in Colab: nothing (needs a package index)"
	@echo "make links          look up every link of the book (needs the network)"

# The environment: made once, and again when what it is made from changes.
.venv/.installed: requirements.txt constraints.txt pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e '.[book]' $(addprefix -c ,$(CONSTRAINTS))
	@touch $@

# What only the benchmarks need.
.venv/.bench: .venv/.installed
	$(INSTALL) -e '.[bench]' $(addprefix -c ,$(CONSTRAINTS))
	@touch $@

# The oldest versions that requirements.txt allows.
.venv-oldest/.installed: requirements.txt pyproject.toml setup.py tests/versions.py
	test -x .venv-oldest/bin/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python tests/versions.py oldest > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[book]' -c .venv-oldest/constraints.txt
	@touch $@

book: .venv/.installed
	$(BIN)/jupyter-book build . --all -q -W -n --keep-going
	$(BIN)/python tests/book_check.py _build/html

links: .venv/.installed
	$(BIN)/jupyter-book build . --all -q --builder linkcheck

# the book takes one core, style and types another
test: .venv/.installed
	$(MAKE) -j2 lint book
	$(MAKE) unit
	$(MAKE) nbval

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/notebook_lint.py
	$(BIN)/oxlint -c .oxlintrc.json pxp/widgets tests/widgets
	$(BIN)/mypy

unit: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 25 tests

zoo: .venv/.installed
	cd tests && ../$(BIN)/python -m zoo.run $(if $(WRITE),--write)

mutants: .venv/.installed
	cd tests && ../$(BIN)/python -m mutants.run

browser: book
	$(BIN)/python -m pytest -q -n 2 -m browser tests/browser

oldest: .venv-oldest/.installed
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" .venv-oldest/bin/python -m pytest -q -n 2 -m "not browser" tests

colab-resolve:
	$(COLAB_PYTHON) tests/versions.py colab

nbval: export PYTHONPATH := $(CURDIR)/tests$(addprefix :,$(PYTHONPATH))
nbval: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadscope $(NBVAL) notebooks

notebooks: .venv/.installed
	$(BIN)/python tests/notebook_execute.py
	$(BIN)/ruff format notebooks

bench: .venv/.bench
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/removal.py

train: .venv/.installed
	$(BIN)/python recipes/training.py vgg resnet vit $(addprefix --root ,$(ROOT))

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
