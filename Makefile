# Every target sets up what it needs, from nothing but Python 3.11 or newer. Run again, it does only what changed.
#
# torch is pinned and installed first and by itself; the rest is installed under a constraint that keeps that build.
# On Linux without an NVIDIA driver it is the CPU build, from the package index in use or from torch's own; elsewhere
# what the package index has. To have another build:
#     make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cu130"    a certain CUDA build
#     make install TORCH=torch==2.11.0                                                another version
# (`make clean` first, where one is already installed.)
# `make test WORKERS=8` runs the tests in eight processes; each takes up to 4 GiB.

TORCH ?= torch==2.13.0
TORCH_ARGS ?=
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
OLDEST_TORCH ?= $(TORCH)
OLDEST_TRANSFORMERS ?= transformers==5.17.*
PYTHON ?=
WORKERS ?= 2

VENV := .venv
OLDEST := .venv-oldest
PIP := -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check test-oldest clean

help: ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-18s%s\n' "$$target" "$$text"; done

install: $(VENV)/ready ## install the package into .venv

demo: $(VENV)/ready ## draw pictures from words with the model of the package
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/ready-dev ## run the tests: no network, no GPU
	$(emoji_font)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS)

check: $(VENV)/ready-dev ## lint, format, who may import whom, types of the public API
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

test-oldest: $(OLDEST)/ready ## run the tests of generation and models on the oldest transformers that we support
	$(OLDEST)/bin/python -m pytest -q -n $(WORKERS) tests/generation tests/modeling tests/processors \
		--deselect tests/modeling/test_released_size.py

clean: ## remove all that these targets made
	rm -rf $(VENV) $(OLDEST) build dist demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The tests of the emoji set draw it. Where the machine has no such font, it goes into .venv; looked up once.
define emoji_font
	@[ -n "$$HF_ARGEN_EMOJI_FONT" ] || [ -f "$$(cat $(VENV)/font.txt 2>/dev/null)" ] || \
		$(VENV)/bin/python scripts/fetch_emoji_font.py > $(VENV)/font.txt
endef

# A virtual environment with torch, and the constraint that keeps it. Each candidate is started, not only looked up: a
# version manager's stand-in may be on the path without an interpreter behind it.
define with_torch
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			exec "$$python" -m venv "$(@D)"; \
		fi; \
	done; \
	echo "hf_argen needs Python 3.11 or newer: install it, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	exit 1
	@install="$(@D)/bin/python $(PIP) install"; \
	if [ "$$(uname -s)" != Linux ] || [ -n "$(TORCH_ARGS)" ] || command -v nvidia-smi >/dev/null; then \
		$$install $(TORCH_ARGS) "$(1)"; \
	else \
		$$install "$(1)+cpu" 2>/dev/null \
			|| $$install --retries 1 --timeout 10 --index-url $(TORCH_CPU_INDEX) "$(1)" 2>/dev/null \
			|| { echo "No CPU build of $(1) within reach; taking the one that the package index has." >&2; \
				$$install "$(1)"; }; \
	fi
	@$(@D)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@
endef

$(VENV)/torch.txt:
	$(call with_torch,$(TORCH))

$(VENV)/ready: $(VENV)/torch.txt pyproject.toml
	$(VENV)/bin/python $(PIP) install -c $< -e .
	@touch $@

$(VENV)/ready-dev: $(VENV)/torch.txt pyproject.toml
	$(VENV)/bin/python $(PIP) install -c $< -e ".[dev]"
	@touch $@ $(VENV)/ready

$(OLDEST)/torch.txt:
	$(call with_torch,$(OLDEST_TORCH))

$(OLDEST)/ready: $(OLDEST)/torch.txt pyproject.toml
	$(OLDEST)/bin/python $(PIP) install -c $< -e ".[dev]" "$(OLDEST_TRANSFORMERS)"
	@touch $@
