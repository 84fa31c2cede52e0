# make demo   environment, install, compress the fixture, run it with a quarter of its experts in memory
# make test   environment, install (which compiles the kernels for Linux CPUs if there is a C++20 compiler), every check
# make check  ruff, mypy, pytest in the environment that is there; what computes a second time without the kernels
# make wheel  a wheel in dist/, with kernels for the version of MLX in the environment, and for no other
# make kernels     compile the kernels again, in place: after a change to them, or an update of MLX
# make sanitize    the kernels' own check under the address and undefined-behaviour sanitizers, then with threads checked
# make check-neon  the same check for 64-bit ARM under an emulator (g++-aarch64-linux-gnu, qemu-user)
# make fuzz        reader and validator on damaged files, guided by coverage, FUZZ_SECONDS long (Linux, Python up to 3.13)
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
SOURCES := setup.py squizd tests tools benchmarks

.PHONY: demo test check lint wheel kernels sanitize check-neon fuzz clean

demo: $(VENV)/installed
	@mkdir -p $(DEMO)
	$(BIN)/squizd compress fixtures/tiny-moe -o $(DEMO)/tiny-moe.squizd --force
	$(BIN)/squizd run $(DEMO)/tiny-moe.squizd --no-chat --resident 25% -n 60 -p "The city was founded in"

test: $(VENV)/installed
	$(MAKE) check

# Whoever runs a model computes with the kernels or without: these files run both ways, and compare with mlx-lm bit for bit
# in the second. Everything else only handles files and numbers as stored, which no kernel touches.
COMPUTING := $(wildcard tests/test_runtime*.py) $(addprefix tests/test_,caches.py cli.py deferral.py failures.py generation.py kernels.py policy.py profile.py reference.py)

# Most tests keep one core busy: so many processes, each a file at a time. WORKERS=0: all in one.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

check: lint
	$(BIN)/python $(PYTEST)
	@if $(BIN)/python -c 'from squizd import kernels; raise SystemExit(bool(kernels.missing()))'; then \
	  echo "SQUIZD_KERNELS=0 python $(PYTEST) $(COMPUTING)"; SQUIZD_KERNELS=0 $(BIN)/python $(PYTEST) $(COMPUTING); fi

lint:
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

# In an isolated build pip's environment may have a newer MLX; setup.py prefers the one in $(VENV).
wheel: $(VENV)/installed
	rm -rf build/lib* build/bdist* dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@$(BIN)/python -m zipfile -l $$(echo dist/*.whl) | grep _native >/dev/null || { echo "the kernels were not compiled: make kernels says why"; exit 1; }
	@echo "$$(echo dist/*.whl), for MLX $$($(BIN)/python -c 'import mlx.core as mx; print(mx.__version__)')"

kernels:
	$(BIN)/python -m squizd.kernels.build
	@test ! -e $(VENV)/installed || touch $(VENV)/installed

SRC := squizd/kernels/src
NATIVE := $(SRC)/work.cpp $(SRC)/shelf.cpp $(SRC)/records.cpp $(SRC)/codes.cpp $(SRC)/slots.cpp $(SRC)/recall.cpp $(SRC)/choose.cpp tests/native/check.cpp
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

FUZZ_SECONDS ?= 60

fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "atheris>=3.0"
	nice $(BIN)/python tools/fuzz/target.py --seconds $(FUZZ_SECONDS)

$(VENV)/installed: pyproject.toml setup.py squizd/kernels/build.py $(wildcard squizd/kernels/src/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "squizd needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module is missing: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info squizd/kernels/_native*
