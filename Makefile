# Every command works on a fresh clone: the environment is made first, and only when its files changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
GEMMA := $(VENV)/.installed-gemma
FULL := $(VENV)/.installed-full
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Two processes share the tests, a file's own in one: half of the time is waiting.
SPREAD := --numprocesses 2 --dist loadfile

.PHONY: help install run check test lint acceptance bench gemma ui flow serve deploy worker secrets clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) found, Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,dev]'
	@touch $@

$(GEMMA): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,gemma,dev]'
	@touch $@

$(FULL): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,gemma,qlora,dev]'
	@touch $@ $(GEMMA)

install: $(STAMP) ## make the environment in .venv

run: $(STAMP) ## bring everything up to date (dvc repro) and print the comparison
	@molf run

check: $(STAMP) ## look for mistakes in params.yaml
	@molf check

lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

test: lint ## ruff, type checker, tests
	pytest -m 'not acceptance' $(SPREAD)

acceptance: $(FULL) ## the whole pipeline, browser, servers, real data
	pytest -m acceptance $(SPREAD)

bench: $(STAMP) ## speed and memory beside plain fine-tuning's, one table (minutes; wants a quiet machine)
	@python -m benchmarks

gemma: $(GEMMA) ## install what the preset gemma needs (240 MB, Gemma terms)

ui: $(STAMP) ## MLflow's page on http://127.0.0.1:5000
	@molf ui

flow: $(STAMP) ## the same pipeline as a Prefect flow, with a temporary server
	@python -m pipelines.flow

serve: $(STAMP) ## Prefect's server on http://127.0.0.1:4200, and all deployments run from here
	@python -m pipelines.serve

deploy: $(STAMP) ## register the deployments with the server of PREFECT_API_URL, for workers
	prefect --no-prompt work-pool inspect molf >/dev/null 2>&1 || prefect --no-prompt work-pool create molf --type process
	PYTHONPATH=$(CURDIR) prefect --no-prompt deploy --all

worker: $(STAMP) ## run flow runs of a work pool in this clone: POOL=molf, LIMIT= at once
	PYTHONPATH=$(CURDIR) prefect --no-prompt worker start --pool $(or $(POOL),molf) --type process $(if $(LIMIT),--limit $(LIMIT))

secrets: ## random passwords for compose.yaml, in .env
	@$(PYTHON) container/make_env.py

clean: ## remove the environment (data, models and results stay)
	rm -rf $(VENV)
