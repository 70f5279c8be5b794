# `make demo` and `make test` need nothing but Python >= 3.11 and make: each installs first what is missing.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
BROKEN := $(VENV)/.incomplete
PYTEST := $(PY) -m pytest -n 2 --dist worksteal

.PHONY: help install demo test slow docs lint types clean

help:
	@echo 'make demo    turn a small ReLU ResNet into a sinusoidal one (ARGS="--help" shows the options)'
	@echo 'make test    all tests that take seconds, and the examples in the docstrings'
	@echo 'make slow    the tests that take minutes, further cases of the others, and what CI has no time for'
	@echo '             (marked long: two of three model families, benchmarks/controller.py)'
	@echo 'make docs    the documentation as pages in site/; a warning is an error'
	@echo 'make lint    ruff: rules and format; import-linter: the order of the rooms'
	@echo 'make types   mypy'
	@echo 'make clean   remove what the tools wrote; .venv stays'
	@echo 'PYTHON=python3.12 chooses the interpreter that .venv is made with.'

install: $(STAMP)

demo: $(STAMP)
	$(PY) examples/finetune_timm.py $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

# pytest's exit status 5 says that no test was selected, which is no failure here
slow: $(STAMP)
	$(PYTEST) -m slow $(ARGS) || test $$? -eq 5

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

types: $(STAMP)
	$(PY) -m mypy

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# pip older than 25.3 reads the pins of the build backend from the first variable, later ones from the second.
# The mark $(BROKEN) stands in a new .venv until its install is complete: one that was interrupted starts over.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: $(PYTHON) not found; install Python >= 3.11 or name one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old; Python >= 3.11 is needed, e.g. make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: the package python3-venv)' >&2; exit 1; }
	@if [ -e $(BROKEN) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  echo 'creating $(VENV)' && rm -rf $(VENV) && mkdir $(VENV) && touch $(BROKEN) && $(PYTHON) -m venv $(VENV); fi
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	  $(PY) -m pip install -c constraints.txt -e '.[dev]'
	@rm -f $(BROKEN) && touch $@
