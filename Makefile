# make demo   environment, install, compress the fixture, run it with a quarter of its experts in memory
# make test   environment, install, every check
# make check  ruff, mypy, pytest in the environment that is there
# On Linux MLX computes on one of two backends: make BACKEND=cpu or BACKEND=cuda (default: cuda where an NVIDIA driver answers).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ifeq ($(shell uname -s),Darwin)
EXTRAS := dev
else
BACKEND ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
EXTRAS := $(BACKEND),dev
endif
DEMO := build/demo

.PHONY: demo test check lint fixtures clean

demo: $(VENV)/installed
	@mkdir -p $(DEMO)
	$(BIN)/squizd compress fixtures/tiny-moe -o $(DEMO)/tiny-moe.squizd --force
	$(BIN)/squizd run $(DEMO)/tiny-moe.squizd --no-chat --resident 25% -n 60 -p "The city was founded in"

test: $(VENV)/installed
	$(MAKE) check

check: lint
	$(BIN)/python -m pytest

lint:
	$(BIN)/ruff check squizd tests tools benchmarks
	$(BIN)/ruff format --check squizd tests tools benchmarks
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "squizd needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
