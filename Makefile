# make test, make demo, make bench: each alone, on a machine with Python, make and a C++ compiler.
# VENV=/path/to/environment uses one that has torch already, and no network.

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# Python compiles the files that are imported; pip would compile all 12,000.
PIP := $(PY) -m pip install --quiet --no-compile
OUT ?= out
CSRC := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
CPP := $(CSRC) $(wildcard bench/gpu_code/ptx/*/*.h bench/gpu_code/ptx/*/*.cpp)
PACKAGE := setup.py pyproject.toml $(CSRC) $(wildcard dqn_fused/*.py dqn_fused/*/*.py kernels/*.py)

ifeq ($(origin VENV),file)
READY := $(VENV)/.ready
LINT := lint
else
READY := install
LINT :=
endif

PTX_TARGETS := sm_75 sm_80 sm_90 sm_120
PTX_TRITON := 3.6

.PHONY: test suite interpret test-all test-anywhere ptx demo bench asan asan-library lint format pictures docs \
	release-check environment install clean

# On all cores; of what is slow a sample, which moves with DQN_FUSED_TEST_SAMPLE (tests/conftest.py).
WORKERS := -n auto --maxprocesses 8 --dist worksteal
PYTEST := $(PY) -m pytest $(WORKERS)
test: $(READY) $(LINT) suite interpret

suite: $(READY)
	$(PYTEST)

interpret: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) -m interpret

# Every case, except those on executed PTX: hours.
test-all: $(READY)
	$(PYTEST) --sample 1 -m "not ptx"
	TRITON_INTERPRET=1 $(PYTEST) --sample 1 -m interpret

# The numerical tests with other vector instructions, numbers of threads and seeds: twenty runs. With ONE_IN=2 each run
# takes the next half of them.
SEEDS ?= 20
FIRST ?= 1
ONE_IN ?= 1
test-anywhere: $(READY)
	$(PY) tests/anywhere.py --seeds $(SEEDS) --first $(FIRST) --one-in $(ONE_IN)

# The suite on the PTX of the Triton kernels and of csrc/cuda, executed without a GPU: every case, on every target.
PTX := $(PYTEST) --sample 1 -m ptx
ptx: $(READY)
	for target in $(PTX_TARGETS); do $(PTX) --ptx-target=$$target || exit 1; done
	test -d build/triton-$(PTX_TRITON) || $(PY) -m pip install --quiet --no-deps --target build/triton-$(PTX_TRITON) \
		"triton==$(PTX_TRITON).*"
	for target in $(PTX_TARGETS); do PYTHONPATH=build/triton-$(PTX_TRITON) \
		$(PTX) --ptx-target=$$target -k "not cuda-ptx" || exit 1; done

demo: $(READY)
	mkdir -p $(OUT)
	$(PY) -m bench demo --plot $(OUT)/cartpole.png

bench: $(READY)
	mkdir -p $(OUT)
	$(PY) -m bench --out $(OUT)

# The CPU ops with AddressSanitizer and UBSan over the suite and broken inputs, or over a part of both: ONE_IN=3.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: asan-library
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000 PYTHONPATH=$(OUT)/asan TORCHDYNAMO_DISABLE=1 \
		$(VENV)/bin/pytest $(WORKERS) -q -m "not ptx" --one-in $(ONE_IN) tests/test_compiled.py tests/test_loss.py \
		tests/test_family.py tests/test_arguments.py tests/test_quantile.py tests/test_quantile_compiled.py \
		tests/test_categorical.py tests/test_categorical_autograd.py tests/test_distributional_autograd.py \
		tests/test_node.py tests/test_row_node.py -k "not torch-cpu and not torch_compile and not opcheck"

asan-library: $(OUT)/asan/.ready

$(OUT)/asan/.ready: $(PACKAGE) | $(READY)
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" DQN_FUSED_BUILD=cpu,autograd \
		$(PY) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target $(OUT)/asan .
	touch $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

pictures: $(READY)
	$(PY) docs/gradient.py docs/gradient.png
	$(PY) examples/large_actions.py --plot docs/large_actions.png
	$(PY) examples/token_q_learning.py --plot docs/token_q_learning.png

# The documentation as a site, in out/site, built in an environment of its own.
docs:
	test -x build/docs/bin/mkdocs || $(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --requirement requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 build/docs/bin/mkdocs build --site-dir $(OUT)/site

# Wheel and sdist: built, looked into, installed away from the sources, tested there; ALSO names other interpreters.
RELEASE := build/release/bin
ALSO ?=
release-check: $(READY)
	test -x $(RELEASE)/auditwheel || { $(PYTHON) -m venv build/release \
		&& $(RELEASE)/python -m pip install --quiet --requirement requirements-release.txt; } || true
	$(PY) -m tools.release_check --out $(OUT)/release $(ALSO:%=--python %) \
		$$(test -x $(RELEASE)/auditwheel && echo --auditwheel $(RELEASE)/auditwheel)

# Another environment: make environment VENV=build/torch-2.10 PACKAGES="torch==2.10.* triton==3.6.*"
PACKAGES ?= torch
environment:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	grep -vE "^(torch|triton)[=>]" requirements-dev.txt > $(VENV)/requirements.txt
	$(PIP) $(foreach package,$(PACKAGES),"$(package)") --requirement $(VENV)/requirements.txt

$(VENV)/.ready: requirements-dev.txt requirements-extras.txt pyproject.toml setup.py dqn_fused/__init__.py $(CSRC)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements-dev.txt
	$(PIP) --requirement requirements-extras.txt --constraint requirements-dev.txt \
		|| echo "without requirements-extras.txt: tests and providers that need other libraries are left out"
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

install:
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
