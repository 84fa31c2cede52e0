# make demo   environment, install, compress the fixture, run it with a quarter of its experts in memory
# make test   environment, install, every check
# make check  ruff, mypy, pytest in the environment that is there
# make kernels     compile the experimental kernels for Linux CPUs, and check everything with them (SQUIZD_KERNELS=1)
# make sanitize    the kernels' own check under the address and undefined-behaviour sanitizers, then with threads checked
# make check-neon  the same check for 64-bit ARM under an emulator (g++-aarch64-linux-gnu, qemu-user)
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

.PHONY: demo test check lint fixtures kernels sanitize check-neon clean

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

kernels: $(VENV)/installed
	$(BIN)/python -m squizd.kernels.build
	SQUIZD_KERNELS=1 $(BIN)/python -m pytest

SRC := squizd/kernels/src
NATIVE := $(SRC)/work.cpp $(SRC)/choose.cpp tests/native/check.cpp
EXACT := -std=c++20 -g -ffp-contract=off -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -pthread
AVX512 := -DSQUIZD_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma

sanitize:
	@mkdir -p build
	set -e; for kind in address,undefined thread; do \
	  flags="$(EXACT) -O1 -fsanitize=$$kind -fno-sanitize-recover=all"; \
	  $(CXX) $$flags $(AVX512) -c $(SRC)/arithmetic.cpp -o build/avx512.o; \
	  $(CXX) $$flags -DSQUIZD_AVX2 -mavx2 -mfma -c $(SRC)/arithmetic.cpp -o build/avx2.o; \
	  $(CXX) $$flags -c $(SRC)/arithmetic.cpp -o build/plain.o; \
	  $(CXX) $$flags $(NATIVE) build/avx512.o build/avx2.o build/plain.o -o build/check; \
	  build/check; \
	done

check-neon:
	@mkdir -p build
	aarch64-linux-gnu-g++ $(EXACT) -O2 -DSQUIZD_NEON -c $(SRC)/arithmetic.cpp -o build/neon.o
	aarch64-linux-gnu-g++ $(EXACT) -O2 -c $(SRC)/arithmetic.cpp -o build/plain.o
	aarch64-linux-gnu-g++ $(EXACT) -O2 -static $(NATIVE) build/neon.o build/plain.o -o build/check-neon
	qemu-aarch64 build/check-neon

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "squizd needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
