# make demo | make test | make gpu. Each sets up what it needs; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
# CUDA kernels are built in where a GPU can run them; `make compile` compiles them everywhere
BUILD ?= $(if $(shell command -v nvidia-smi),,cpu)

.PHONY: setup demo test lint docs compile bench gpu sanitize clean

setup: $(VENV)/.ready

# torch first and by version: a bare "torch" may bring gigabytes of CUDA to a machine without a GPU
$(VENV)/.ready: pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" numpy
	SURVFUSE_BUILD=$(BUILD) $(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/survfuse demo --out runs/demo

# the tests start dozens of processes of these sources, which are compiled once for all of them
test: setup
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal -q -p no:benchmark

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' \
		'benchmarks/*.cu' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

docs: setup
	$(BIN)/python -m benchmarks.render --check

# ahead-of-time compiles without a GPU: every Triton kernel for every target, and for Hopper, where
# nothing may spill but what is listed with its bytes, every configuration the launchers choose;
# then, where there is an nvcc, every CUDA file for every architecture
compile: setup
	env -u TRITON_INTERPRET $(BIN)/python tests/compile_triton.py --quick
	env -u TRITON_INTERPRET $(BIN)/python tests/compile_triton.py --targets sm_90
	$(BIN)/python tests/compile_cuda.py

# about half an hour on two quiet cores, 20 minutes of it for models; all shapes: pytest benchmarks
bench: setup
	$(BIN)/python -m pytest benchmarks --core -q --benchmark-disable-gc
	$(BIN)/python -m benchmarks.render

# offline, with the torch, triton and nvcc that are installed; made to fit nine minutes: the tests
# that need a GPU, then the core set of every benchmark. SHARD=k/n measures a part of the set, tests
# run with the first; SET= (empty) takes all shapes. Rows are written as they come.
SET ?= core
gpu:
	SURVFUSE_BUILD=cuda $(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps -e .
	$(if $(SHARD:1/%=),,$(PYTHON) -m pytest tests/ops -q -m gpu -p no:cacheprovider)
	$(if $(SHARD:1/%=),,$(if $(shell command -v compute-sanitizer),$(MAKE) sanitize))
	$(PYTHON) -m pytest benchmarks -q -p no:cacheprovider --device cuda $(addprefix --,$(SET))
	$(PYTHON) -m benchmarks.render

# wild accesses, and races in shared memory, of the CUDA C++ kernels, on a GPU
SANITIZED = atomic or (within_budget and native-cuda and (three or integers or odd))
sanitize:
	for tool in memcheck racecheck synccheck; do \
		compute-sanitizer --tool $$tool --kernel-name kns=survfuse --error-exitcode 1 \
			$(PYTHON) -m pytest tests/ops/test_multi_scale_deformable_attention.py -q -m gpu \
			-p no:cacheprovider -k "$(SANITIZED)" || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info survfuse/_native*.so
