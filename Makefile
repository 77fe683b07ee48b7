# make demo   the whole story on the packaged model; results in OUT (default demo-out)
# make test   all tests          make check   formatting, lint, types
# make faults   kills, full disks, damaged files: about 40 minutes; results in faults-out; KIND="kill step" runs some kinds
# make venv   only install, into .venv         make clean   remove caches and builds (rm -rf .venv starts over)
#
# The first call compiles llama.cpp; every later one starts at once, unless pyproject.toml or constraints.txt changed.

PYTHON ?= python3
OUT ?= demo-out
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
TORCH := 2.13.0
LOG := $(VENV)/llama-build.log

.PHONY: demo test faults check venv clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	@$(VENV)/bin/edgecl demo --out "$(OUT)"

test: $(VENV)/.installed-test
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	@$(PY) -m pytest -m alone

faults: $(VENV)/.installed-test
	@$(PY) -m tests.faults $(KIND)

check: $(VENV)/.installed-test
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m mypy

venv: $(VENV)/.installed-test

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older: apt-get install python3.11-venv, then PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "python3 -m venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The CPU build, which an open requirement would replace by several GB of CUDA; its dependencies come with the last step.
$(VENV)/.torch: | $(PY)
	@if ! $(PY) -c 'import torch' 2>/dev/null; then \
		echo "installing torch $(TORCH), CPU build (200 MB)"; \
		$(PIP) install --no-deps "torch==$(TORCH)+cpu" 2>/dev/null || \
		$(PIP) install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)"; \
	fi
	@touch $@

# GCC 12.2 leaves out what AMX kernels need (convert/edgecl_convert/amx.py).
FOR_AMX := $(if $(shell grep -sm1 amx_int8 /proc/cpuinfo),-fno-dse -fno-tree-dse)

# Other CMAKE_ARGS compile llama.cpp anew, not from pip's cache, which does not know them; none leave it as it is.
$(VENV)/.cmake-args: FORCE | $(PY)
	@if [ ! -f $@ ] || { [ -n "$(CMAKE_ARGS)" ] && [ "$(CMAKE_ARGS)" != "$$(cat $@)" ]; }; then printf %s "$(CMAKE_ARGS)" >$@; fi

$(VENV)/.llama: constraints.txt $(VENV)/.torch $(VENV)/.cmake-args
	@command -v $(CXX) >/dev/null || { echo "A C++ compiler is missing: apt-get install g++"; exit 1; }
	@echo "compiling llama.cpp: about 6 minutes the first time; later installs take it from pip's cache"
	@( s=0; while sleep 30 >/dev/null 2>&1; do s=$$((s + 30)); echo "  still compiling after $$s s"; done ) & ticker=$$!; \
	trap 'kill $$ticker 2>/dev/null' EXIT INT TERM; \
	CXXFLAGS="$(FOR_AMX) $(CXXFLAGS)" CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(PY) -m pip install -v -c constraints.txt \
		$(if $(CMAKE_ARGS),--no-cache-dir --force-reinstall) llama-cpp-python >$(LOG) 2>&1 || \
		{ tail -n 25 $(LOG); echo "llama.cpp did not compile; the whole output is in $(LOG)"; exit 1; }
	@touch $@

$(VENV)/.installed-demo: EXTRAS := demo,plot
$(VENV)/.installed-test: EXTRAS := test
$(VENV)/.installed-%: pyproject.toml constraints.txt $(VENV)/.llama
	@echo "installing edgecl[$(EXTRAS)] and the rest of what it needs"
	@$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
