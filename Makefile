# Every target works on a fresh clone. PYTHON=/path/to/python3.12 chooses the interpreter for .venv.
SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv demo lab short-long test bench gpu-check soak lint clean

VENV := .venv
STAMP := $(VENV)/.installed
VENV_PYTHON := $(VENV)/bin/python

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | while IFS= read -r line; do \
	    printf 'make %-10s %s\n' "$${line%%:*}" "$${line##*## }"; done

venv: $(STAMP) ## make .venv with the project (editable) and its development extras

# Byte-compiling every installed file would take minutes; Python compiles what is imported.
$(STAMP): pyproject.toml setup.py tools/peers.txt
	@python="$$(PYTHON='$(PYTHON)' sh tools/find_python.sh)"; \
	echo "venv: $$python makes $(VENV), then pip installs the project (several GB, some minutes)"; \
	"$$python" -m venv $(VENV); \
	PYTHONUNBUFFERED=1 $(VENV_PYTHON) -m pip install --no-compile --progress-bar off --editable '.[dev]' \
	    | sed -nuE 's/^ *((Downloading|Installing collected packages|Successfully installed) ?[^ ,]*).*/\1/p'; \
	$(VENV_PYTHON) -m pip install --no-compile --progress-bar off --no-deps --target $(VENV)/peers --upgrade \
	    --requirement tools/peers.txt | sed -nu 's/^ *\(Downloading [^ ,]*\).*/\1/p'; \
	touch $@

demo: venv ## run the main job on a real model on this machine's CPU; writes runs/demo/report.html
	$(VENV_PYTHON) -m examples.quickstart.run --output runs/demo

lab: venv ## compare the arms on a synthetic retrieval language, 3 seeds; writes runs/lab/report.html
	$(VENV_PYTHON) -m examples.lab.run --output runs/lab

short-long: venv ## distil long retrieval from packed short samples, 3 seeds; writes runs/short_long/report.html
	$(VENV_PYTHON) -m examples.short_data_long_context.run --output runs/short_long

test: venv ## run the whole suite
	$(VENV_PYTHON) -m pytest

bench: venv ## every benchmark beside its peers; writes runs/bench/results.json
	$(VENV_PYTHON) tools/run_benchmarks.py --output runs/bench

# GPU_PYTHON=python3 uses an interpreter that has everything, where nothing can be installed (docs/gpu.md).
gpu-check: $(if $(GPU_PYTHON),,venv) ## what has to be right and fast on one GPU; writes runs/gpu_check/results.json
	$(or $(GPU_PYTHON),$(VENV_PYTHON)) tools/gpu_check.py --output runs/gpu_check $(GPU_CHECK_FLAGS)

soak: venv ## the long reliability counts; writes runs/soak/results.json
	$(VENV_PYTHON) tools/run_soak.py --output runs/soak

lint: venv ## ruff: rules and format
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
