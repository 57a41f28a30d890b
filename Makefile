# Every task of this repository. `make` alone lists them.
PY := .venv/bin/python
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fast soak format docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## make or refresh .venv (does nothing when it is up to date)
	@scripts/setup_cpu.sh

demo: setup ## run the whole pipeline on this machine's CPU
	.venv/bin/epd demo $(ARGS)

test: setup check ## check, then every test
	$(PY) -m pytest --junitxml=build/tests.xml $(ARGS)

check: setup ## lint, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

fast: setup ## the pure tests only: seconds, no engine, no GPU
	$(PY) -m pytest -m "not engine and not gpu" $(ARGS)

soak: setup ## ten minutes of requests and faults against a whole pipeline
	$(PY) -m tests.soak $(ARGS)

format: setup ## let ruff format and fix what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

docs: setup ## regenerate the generated pages of docs/ (models.md: python -m tests.models report)
	$(PY) -m epd.docs
	$(PY) -m epd.planning.page
	$(PY) -m tests.faults

bench: setup ## run the benchmarks
	$(PY) -m benchmarks $(ARGS)

clean: ## remove caches and build outputs (not .venv)
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
