# Two commands matter: `make demo` and `make test`. Each sets itself up: virtual environment, dependencies, extension.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/c*/*.cpp csrc/c*/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)
# One thread: the models here are tiny, and threads that wait for each other cost more than they bring.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export MAX_JOBS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Processes that share the test files between them.
WORKERS ?= 2

.PHONY: demo test lint bench cuda-check gpu-check clean setup

demo: $(STAMP)
	$(BIN)/loraforge demo --out demo-run --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/loraforge bench --out benchmarks/results/bench.json --plot docs/bench.png --overwrite
	$(BIN)/python -m pytest -q -o addopts= --benchmark-only --benchmark-disable-gc benchmarks/bench_kernels.py
	$(BIN)/python -m benchmarks.merge_factored
	$(BIN)/python -m benchmarks.iteris_against_loop

# The CUDA kernels without a GPU: compiled for three architectures, and their text run by the thread emulator.
cuda-check: $(STAMP)
	$(BIN)/python csrc/cuda_check.py
	$(BIN)/python -m pytest -q tests/kernels -k "emulat or cuda_compiles"

# On a machine with a CUDA GPU: build, GPU tests, sanitizer, benchmarks; writes benchmarks/results/<gpu>.json.
gpu-check:
	bash benchmarks/gpu_check.sh

setup: $(STAMP)

$(STAMP): $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "setuptools>=77" wheel ninja pybind11 numpy torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo-run *.egg-info loraforge/_C*.so
