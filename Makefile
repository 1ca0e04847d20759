# make demo   .venv, pinned dependencies, compiled kernels, then the main job on the embedded default
# make test   the same set-up if need be, then the whole test suite
# make gpu-test, make gpu-bench   on a machine with a CUDA GPU, with the Python, torch, triton and nvcc that it has
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)

RECIPES := $(filter-out %_setup.py,$(wildcard benchmarks/papers/*_*.py))

.PHONY: setup demo test bench bench-ops evidence gpu-test gpu-bench papers lint format wheel-test clean

setup: $(SETUP)

# without build isolation, so that the extension is built against the very torch that is installed;
# a failed step leaves no $(SETUP), and the next make tries again
$(SETUP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools ninja wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[demo,energy,dev]"
	touch $@

demo: $(SETUP)
	$(BIN)/pysparse-ticket info
	$(BIN)/pysparse-ticket compare $(DEMO)

test: $(SETUP)
	$(BIN)/python -m pytest

# every benchmark program (BENCH="layer_skip ..." for some) into benchmarks/results/cpu.csv and cpu.md; wants a quiet machine
bench: $(SETUP)
	$(BIN)/python benchmarks/run.py $(BENCH)

# each op's times, kept under .benchmarks/; OPS="--benchmark-compare" compares them with the run kept last
bench-ops: $(SETUP)
	$(BIN)/python -m pytest benchmarks/suite -o addopts=-q --benchmark-only --benchmark-autosave $(OPS)

# docs/tickets.md's tables of evidence, about an hour of two cores; run again, it goes on where it stopped
evidence: $(SETUP)
	cd benchmarks && ../$(BIN)/python -m evidence $(EVIDENCE)

# the papers' tables, each small and on embedded data in a minute or two; one in full: python benchmarks/papers/layers_table2.py --data-root DIR
papers: $(SETUP)
	for recipe in $(RECIPES); do $(BIN)/python $$recipe --quick || exit 1; done

# on a machine with a CUDA GPU: builds in place with $(PYTHON) and the torch, triton and nvcc that it has, installs nothing,
# ends within BUDGET seconds (570); logs and results also go to the folder OUT
gpu-test:
	PYTHONPATH="$(CURDIR):$(CURDIR)/benchmarks:$$PYTHONPATH" $(PYTHON) -m gpu.tests

# into benchmarks/results/<gpu>/gpu.csv and gpu.md, stage by stage; STAGES="resnet50 vit" runs some
gpu-bench:
	PYTHONPATH="$(CURDIR):$(CURDIR)/benchmarks:$$PYTHONPATH" $(PYTHON) -m gpu.run $(STAGES)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# a wheel in a venv of its own, used from outside the source tree
wheel-test: $(SETUP)
	.ci/wheel-test $(BIN)/python

clean:
	rm -rf $(VENV) build dist *.egg-info pysparse_ticket/*.so
