# Every target sets up what it needs, from nothing but Python 3.11 or 3.12.
#
# The pinned torch is the plain wheel of the package index in use. Where that index serves CUDA builds and the machine
# has no GPU, name the CPU index:   make install TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
TORCH_ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
OLDEST := .venv-oldest
PIP := -m pip --disable-pip-version-check -q

.PHONY: install demo test check test-oldest clean

install: $(VENV)/ready

demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/ready-dev
	$(VENV)/bin/python -m pytest -q

check: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

# The generation tests on the oldest transformers that we support.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -q tests/generation tests/modeling tests/processors --deselect tests/modeling/test_released_size.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist demo .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "hf_argen needs Python 3.11 or 3.12; install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# torch first and by itself, so that no other requirement decides which build comes.
$(VENV)/torch: $(VENV)/bin/python
	$(VENV)/bin/python $(PIP) install $(TORCH_ARGS) "$(TORCH)"
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml
	$(VENV)/bin/python $(PIP) install -e . "$(TORCH)"
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(VENV)/bin/python $(PIP) install -e ".[dev]" "$(TORCH)"
	@touch $@

$(OLDEST)/ready: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) install $(TORCH_ARGS) "$(TORCH)"
	$(OLDEST)/bin/python $(PIP) install -e . "transformers==5.17.*" pytest "$(TORCH)"
	@touch $@
