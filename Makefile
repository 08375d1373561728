# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs: `make demo` or `make test` is enough on a fresh clone.
PYTHON ?= python3
VENV := .venv
# Absolute, so that clang-format, ruff and friends of the environment come before the machine's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
KERNEL_SOURCES := $(shell find plugins -name CMakeLists.txt -o -name '*.cmake' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# GPUs that the kernels are built for: those last asked for, so that every later make builds for them, too.
ARCHS := $(or $(EDGECASCADE_CUDA_ARCHS),$(shell cat $(VENV)/.archs 2>/dev/null))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-races test-gpu check bench faults clean always

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.kernels  ## a virtual environment with the package, the kernel library and the developer's tools
	@$(VENV)/bin/edgecascade doctor

demo: $(VENV)/.kernels  ## command the robot's model in the box, also over MQTT; every number and answer is checked
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/.kernels  ## the whole suite; needs no GPU
	$(VENV)/bin/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-races: $(VENV)/.kernels  ## the CUDA kernels' suite in the emulator, watched for data races; without its longest tests
	EDGECASCADE_TEST_RACES=1 $(VENV)/bin/python -m pytest -q -n auto --dist worksteal --no-loadscope-reorder \
	    tests/test_*_kernel*.py -k 'cuda-emulated and not (pieces_and_steps or 131072 or follow_the_prob or 129- or 500-)'

test-gpu: $(VENV)/.kernels  ## the suite of the ops on this machine's NVIDIA GPU
	EDGECASCADE_TEST_GPU=1 $(VENV)/bin/python -m pytest -q tests -k 'kernel and cuda'

check: $(VENV)/.kernels  ## format, lint, types and import directions
	ruff format --check .
	ruff check .
	mypy --strict edgecascade build_engine
	clang-format --dry-run --Werror $$(git ls-files 'plugins/*.cpp' 'plugins/*.h' 'plugins/*.cu' 'plugins/*.cuh')
	$(VENV)/bin/python -m pytest -q tests/test_repo.py

bench: $(VENV)/.kernels  ## kernels against this machine's own ceilings
	$(VENV)/bin/python benchmarks/kernels.py

faults: $(VENV)/.kernels  ## power cuts, kills, bad disks and networks against fleet updates, counted; 2 minutes
	$(VENV)/bin/edgecascade faults --json build/faults.json

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist edgecascade/_lib *.egg-info .mypy_cache .ruff_cache .pytest_cache

# System site packages, because JetPack's TensorRT lives there. Debian splits ensurepip off into
# python3-venv; without it, an environment that sees the system's pip does as well.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "EdgeCascade needs Python 3.10 or later, $$($(PYTHON) --version) is too old: make PYTHON=python3.12"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv --system-site-packages $(VENV) >/dev/null 2>&1 \
	    || $(PYTHON) -m venv --system-site-packages --without-pip --clear $(VENV) \
	    && $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); \
	    echo "$(PYTHON) has neither ensurepip nor pip: sudo apt-get install python3-venv"; exit 1; }
	@touch $@

# Without build isolation, so that CMake and ninja stay at hand for the next change of a source.
$(VENV)/.installed: $(VENV)/.created pyproject.toml setup.py
	@echo "installing the package and its tools (compiles the kernel library once)"
	@$(PIP) install -qq --upgrade 'setuptools>=77' wheel 'cmake>=3.24' ninja
	@$(PIP) install -qq --no-build-isolation --editable '.[dev]'
	@touch $@

# Touched only when other GPUs are asked for.
$(VENV)/.archs: always | $(VENV)/.installed
	@test -e $@ && test "$$(cat $@)" = '$(ARCHS)' || echo '$(ARCHS)' >$@

$(VENV)/.kernels: $(VENV)/.installed $(VENV)/.archs $(KERNEL_SOURCES)
	@EDGECASCADE_CUDA_ARCHS='$(ARCHS)' $(VENV)/bin/python setup.py -q build_ext --inplace
	@touch $@
