# Everything a developer types. `make` alone lists the targets. Works with GNU make 3.81 and newer.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The oldest Triton that is supported, beside the newest: kernels are compiled under both (tests/kernels/test_compiled.py).
OLDEST := $(VENV)/triton-oldest
RUN := PYTHONPATH=.:$(PYTHONPATH)

# What makes .venv (3.11 or newer; the default looks further if python3 is older) and what the gpu targets run: make test PYTHON=python3.12
PYTHON ?= python3
PYTHONS := $(if $(filter python3,$(PYTHON)),python3 python3.14 python3.13 python3.12 python3.11,$(PYTHON))
# More arguments for the program behind a target: make demo ARGS=--help, make test ARGS='-x -k pool'
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint gpu-test gpu-bench gpu-sanitize clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## manager, prefill and decode workers serve a small model; the text is compared with transformers' own
	@$(BIN)/kvmanager demo $(ARGS)

test: lint $(OLDEST)/.installed ## lint, then all tests (those that need a GPU skip themselves without one)
	@echo "==> pytest"
	@$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	@echo "==> ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff .; exit 1; }
	@$(BIN)/python -m mypy

# Downloaded and unpacked, 0.8 GB, once. Where there is no wheel (other systems, a newer Python) the test of it says so and skips.
$(OLDEST)/.installed: constraints-oldest.txt $(STAMP)
	@rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	@echo "==> $$(cat $<) into $(OLDEST) (large: a minute, the first time)"
	@$(BIN)/python -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target $(OLDEST) -r $< \
		&& touch $@ || echo "make: not to be had here; kernels are compiled under the newest Triton alone" >&2

gpu-test: ## the tests that need a CUDA device, with the machine's own python3, torch and triton; nothing is installed
	@$(RUN) $(PYTHON) -m pytest tests/gpu -m gpu $(ARGS)

gpu-bench: ## check the kernels, then time them: card, floor, time, percent of floor, peers; one table, a roofline; nothing is installed
	@$(RUN) $(PYTHON) benchmarks/bench_decode.py $(ARGS)
	@$(RUN) $(PYTHON) benchmarks/bench_write.py
	@$(RUN) $(PYTHON) benchmarks/bench_sparse.py
	@$(RUN) $(PYTHON) benchmarks/bench_cascade.py
	@$(RUN) $(PYTHON) benchmarks/bench_plan.py
	@$(RUN) $(PYTHON) benchmarks/result_files.py
	@$(RUN) $(PYTHON) benchmarks/plot_kernels.py --png docs/roofline.png

gpu-sanitize: ## every kernel on a small case under compute-sanitizer: memcheck and racecheck; nothing is installed
	@$(RUN) $(PYTHON) tests/gpu/sanitize.py $(ARGS)

clean: ## remove build outputs and caches (.venv stays; rm -r it to begin anew)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	@find . -name $(VENV) -prune -o -name .git -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Redone when the dependencies change. The stamp is written last, so an interrupted set-up is taken up again; a .venv made by hand is
# completed, not replaced. torch comes first and alone: it is by far the largest, and what follows must find that version installed.
$(STAMP): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		found=; \
		for python in $(PYTHONS); do \
			if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "make: expected Python 3.11 or newer, found none of: $(PYTHONS). Name one: make PYTHON=/path/to/python3" >&2; exit 1; \
		fi; \
		echo "==> $(VENV) with $$($$found --version)"; \
		$$found -m venv $(VENV); \
	fi
	@echo "==> torch (large: minutes, the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	@echo "==> kvmanager and what it needs"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,nixl]'
	@touch $@
