# From a bare clone:  make demo | make test.  While working on kernels:  make build.
VENV   ?= .venv
PYTHON ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
# One thread for each test process: threads of two processes that wait for each other spin.
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test gpu-test build device-tests lint format sanitize clean

demo: build
	$(PYTHON) -m lctx_kernels.cli demo $(DEMO_ARGS)

test: build
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q $(PYTEST_ARGS)

# On Hopper GPUs, GPUS=0,1 for two: tests of one GPU spread over them all, then those that start ranks.
# 8 processes share the memory of a GPU, 13 ran out of 141 GB; ranks have deadlines, so two tests at a time.
GPUS     ?= 0
GPU_JOBS ?= 8
gpu-test: build
	LCTX_TEST_GPUS=$(GPUS) $(PYTHON) -m pytest -q -n $(GPU_JOBS) --dist worksteal -m "cuda and not dist"
	$(PYTHON) -m pytest -q -n 2 --dist worksteal -m "cuda and dist"

# Compiles what changed into lctx_kernels/_C.abi3.so. PYTHON=... builds with another environment's torch.
build: $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/ready)
	$(PYTHON) setup.py -q build_ext --inplace

# Compiles the tests of csrc/common for a GPU into build/liblctx_device_tests.so; python_tests/device
# loads it.
device-tests: build
	PATH="$(abspath $(dir $(PYTHON))):$$PATH" && cmake build -DLCTX_BUILD_TESTS=ON >build/device_tests.log \
	  && cmake --build build --target lctx_device_tests

# Everything that demo, test and lint need.
$(VENV)/ready: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "$(TORCH)" "setuptools>=77" wheel "cmake>=3.24" "ninja>=1.10" \
	  "pybind11>=2.12"
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

SOURCES = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')

lint: $(VENV)/ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)
	$(PYTHON) -m mypy

format: $(VENV)/ready
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# On a machine with a Hopper GPU: compute-sanitizer over small calls of every op.
sanitize: build
	$(PYTHON) tools/sanitize.py $(SANITIZE_ARGS)

clean:
	rm -rf build dist *.egg-info lctx_kernels/*.so
