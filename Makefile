# Needs Python 3.11 or newer, pip and make. Everything is installed into .venv, once, and again when it goes stale.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
DEMO ?=
BENCH ?= quality speed grammar concurrency overlap scaling memory
TESTS ?= tests
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-agent test lint format bench demo-models build clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## Watch a search raise the reward of an answer (DEMO="--prompts 3" passes options)
	$(BIN)/langchain-aisp demo $(DEMO)

demo-agent: $(VENV)/.installed-agents ## Watch a support agent answer three customers with tools
	$(BIN)/python examples/support_agent.py

test: $(VENV)/.installed-dev ## Run every test, the examples and the code in the docs (TESTS=path narrows it)
	$(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(TESTS)

lint: $(VENV)/.installed-dev ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# benchmarks.gpu is not among them: it needs a GPU (--shape tiny shows that it works).
bench: $(VENV)/.installed ## Measure quality, speed and more into benchmarks/results (BENCH="speed memory" narrows it)
	for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name || exit 1; done

demo-models: $(VENV)/.installed ## Train the demo's language and reward model anew
	$(BIN)/python -m training.build

build: $(VENV)/.installed ## Build the wheel and the source distribution into dist/
	$(INSTALL) build
	$(BIN)/python -m build

clean: ## Remove .venv, caches and built packages
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "langchain-aisp needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing langchain-aisp and its dependencies into $(VENV); the first time this takes minutes."
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable '.[cli]'
	@touch $@

$(VENV)/.installed-agents: $(VENV)/.installed
	$(INSTALL) --editable '.[cli,agents]'
	@touch $@

# pip reads dependency groups since version 25.1; the rule above has brought a newer one.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --group dev
	@touch $@
