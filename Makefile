# make test, make demo, make bench: each alone, on a machine with Python, make and a C++ compiler.
# VENV=/path/to/environment uses one that has torch already, and no network.

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
OUT ?= out
CSRC := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

ifeq ($(origin VENV),file)
READY := $(VENV)/.ready
LINT := lint
else
READY := install
LINT :=
endif

.PHONY: test suite interpret demo bench asan lint format pictures install clean

# Side by side: a process of either uses one core most of the time.
test: $(READY) $(LINT)
	$(MAKE) --no-print-directory -j2 --output-sync=target suite interpret

suite: $(READY)
	$(PY) -m pytest

interpret: $(READY)
	TRITON_INTERPRET=1 $(PY) -m pytest -m interpret

demo: $(READY)
	mkdir -p $(OUT)
	$(PY) -m bench demo --plot $(OUT)/cartpole.png

bench: $(READY)
	mkdir -p $(OUT)
	$(PY) -m bench --out $(OUT)

# The CPU ops with AddressSanitizer and UBSan over the suite and broken inputs.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: $(READY)
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" DQN_FUSED_BUILD=cpu \
		$(PY) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target $(OUT)/asan .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000 PYTHONPATH=$(OUT)/asan TORCHDYNAMO_DISABLE=1 \
		$(VENV)/bin/pytest -q tests/test_compiled.py tests/test_loss.py tests/test_family.py tests/test_arguments.py \
		-k "not torch-cpu and not torch_compile and not opcheck"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CSRC)

pictures: $(READY)
	$(PY) docs/gradient.py docs/gradient.png
	$(PY) examples/large_actions.py --plot docs/large_actions.png

$(VENV)/.ready: requirements-dev.txt requirements-extras.txt pyproject.toml setup.py $(CSRC)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	$(PY) -m pip install --quiet --requirement requirements-extras.txt --constraint requirements-dev.txt \
		|| echo "without requirements-extras.txt: tests and providers that need other libraries are left out"
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

install:
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
