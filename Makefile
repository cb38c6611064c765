PYTHON ?= python3

.PHONY: help install check test thorough docs boundscheck benchmarks

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## install vtsim and the development tools
	$(PYTHON) -m pip install '.[dev]'

check:  ## the whole gate: format, lint, types, layers, tests compiled and interpreted, docs
	PYTHON=$(PYTHON) ./check

test:  ## the tests alone, compiled
	$(PYTHON) -m pytest

thorough:  ## the long tests, and three times as many random worlds for the walkers' oracles
	$(PYTHON) -m pytest -m long
	VTSIM_EXAMPLES=3 $(PYTHON) -m pytest tests/oracle

boundscheck:  ## the tests with every array index checked
	NUMBA_BOUNDSCHECK=1 $(PYTHON) -m pytest

docs:  ## write the generated documents
	$(PYTHON) -m scripts.generate_docs

benchmarks:  ## measure the rates in docs/performance.md
	$(PYTHON) -m benchmarks
