# Every target sets up what it needs in .venv, from the pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint bench gpu clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /: /'

demo: .venv/demo ## meta-train the sine regression of the MAML paper and show what it learned
	$(BIN)/fomaml-fused train sine --out runs/sine

test: .venv/dev lint ## lint, types and tests
	$(BIN)/python -m pytest -n 2

lint: .venv/dev ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/dev ## time the workloads against their peers and print the table
	$(BIN)/python -m pytest bench -p no:xdist -W default --benchmark-json=bench/results/latest.json
	$(BIN)/python -m bench.report bench/results/latest.json

gpu: ## the GPU suite (not there yet: the kernels come first)
	@echo "there is no GPU engine yet; 'fomaml-fused doctor' says what runs on this machine" >&2; exit 1

clean: ## remove what the other targets made
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/demo .venv/dev: .venv/%: pyproject.toml setup.py constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
