# Each target creates the environment .venv first; it is created again only when pyproject.toml changes.

PYTHON ?= python3
# make test TORCH=2.11 tests with that version of PyTorch, and its Triton, in an environment of their own.
TORCH  ?=
VENV   ?= .venv$(if $(TORCH),-$(TORCH))

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 1)')
# Options for pytest: make test PYTEST_ARGS='-k attention -x'
PYTEST_ARGS ?=

# What a wheel could lack: a module, a name, an entry point, a kernel.
WHEEL_TESTS := $(addprefix tests/test_,lazy.py cli.py vit.py layer_norm.py weights.py hub.py)

# One thread per worker: the workers already use every core.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-compiled codegen lint docs wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## Train a small ViT on handwritten digits, then classify with both backends
	$(BIN)/python examples/digits.py

# TRITON_INTERPRET is set before Python starts: Triton reads it once, on import.
test: $(STAMP) ## Run all tests on kernels compiled for this CPU, then the op tests in Triton's interpreter
	env -u TRITON_INTERPRET -u VIT_TRITON_EMULATE $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)
	env -u VIT_TRITON_EMULATE $(TEST_ENV) TRITON_INTERPRET=1 $(BIN)/pytest -n $(WORKERS) -m compiled $(PYTEST_ARGS)

test-compiled: $(STAMP) ## Run the op tests on code compiled for sm_80, in the emulator tests/ptxemu
	env -u TRITON_INTERPRET VIT_TRITON_EMULATE=1 $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) -m compiled $(PYTEST_ARGS)

# Compiled kernels stay in Triton's cache: a second run only disassembles them.
codegen: $(STAMP) ## Compile every tile for every GPU and dtype and check the machine code; takes hours, needs no GPU
	env -u TRITON_INTERPRET -u VIT_TRITON_EMULATE $(TEST_ENV) VIT_TRITON_CODEGEN=1 \
	    $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS) tests/test_codegen.py

lint: $(STAMP) ## Check style, imports and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: ## Build the source distribution and the wheel, check them, and test the wheel in a new environment
	PYTHON=$(PYTHON) .ci/wheel -n $(WORKERS) $(or $(PYTEST_ARGS),$(WHEEL_TESTS))

clean: ## Remove the environments and everything generated
	rm -rf .venv .venv-* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache site demo_output training_output

$(STAMP): pyproject.toml
	@echo "creating $(VENV) (the first time downloads PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,docs]' $(if $(TORCH),'torch==$(TORCH).*')
	@touch $@
