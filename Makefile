# make demo   the main job: quantize a real model, run it, compare      make test   lint, types, tests, conformance
# make dev    just the environment in .venv                             make lint   style, types, import rules
# make docs   the documentation site in build/site                      make bench  speed and memory bars
# make test-browser   the conformance page in headless Chromium, at phone and desktop width
# make conformance-rocm   what is known of AMD GPUs without one      make cuda-offline   kernels compiled for NVIDIA GPUs
# make conformance-npu    the NPU backend against the torch_npu wheel, without an NPU; an environment of its own
# make modelslim-demo     the demo model quantized by ModelSlim's own command, and run on the emulated NPU
# make compile-full   every kernel for every chip, and the tables of docs/kernels.md and docs/rocm.md
PYTHON ?= python3
VENV ?= .venv
# pip arguments: any torch >= 2.11 works; for CPU-only wheels see README "Install"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
NPU_VENV ?= .venv-npu
SLIM_VENV ?= .venv-modelslim
DISTRIBUTIONS := -e . -e backends/cpu_reference -e backends/triton -e backends/cuda -e backends/rocm -e backends/npu
SOURCES := qhal portable schemes conformance engines cli backends tests benchmarks examples docs
PYTEST_WORKERS ?= 2

.PHONY: help dev chromium demo kv-quality test test-browser lint format conformance docs docs-update docs-picture bench clean \
  conformance-rocm conformance-npu cuda-offline compile-full modelslim-demo
help:
	@head -8 Makefile | sed 's/^# //'

dev: $(VENV)/.installed
# one command line for all of ours: none of them is fetched from the index
$(VENV)/.installed: pyproject.toml requirements-dev.txt $(wildcard backends/*/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qhal needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	sed 1d requirements-dev.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation $(DISTRIBUTIONS)
	@touch $@

demo: dev
	$(BIN)/python examples/demo/demo.py

kv-quality: dev
	$(BIN)/python examples/kv_quality/kv_quality.py

lint: dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	MYPYPATH=conformance/qhal_conformance/kit/template $(BIN)/mypy --config-file= --strict --untyped-calls-exclude torch -p qhal_acme
	PYTHONPATH= $(BIN)/lint-imports

format: dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

conformance: dev
	OMP_NUM_THREADS=1 $(BIN)/qhal conformance run --backend cpu_reference --level 0 --jobs $(PYTEST_WORKERS) --out build/conformance

# torch_npu is in no other environment: with it installed a plain `import torch` fails where CANN is absent
NPU_WHEEL := backends/npu/requirements-conformance.txt
$(NPU_VENV)/.installed: $(NPU_WHEEL) pyproject.toml backends/cpu_reference/pyproject.toml backends/npu/pyproject.toml \
  backends/npu/emulation/pyproject.toml
	$(PYTHON) -m venv $(NPU_VENV)
	$(NPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(NPU_WHEEL)
	$(NPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
	  -e . -e backends/cpu_reference -e backends/npu -e backends/npu/emulation
	@touch $@

conformance-npu: $(NPU_VENV)/.installed
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 $(NPU_VENV)/bin/python -m qhal_npu_emulation levels
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU_VENV)/bin/python -m qhal_npu_emulation tables --check

# ModelSlim has an environment of its own: qhal reads its files and needs nothing of it
SLIM := examples/modelslim/requirements.txt
$(SLIM_VENV)/.installed: $(SLIM)
	$(PYTHON) -m venv $(SLIM_VENV)
	$(SLIM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(SLIM)
	@touch $@

modelslim-demo: dev $(NPU_VENV)/.installed $(SLIM_VENV)/.installed
	$(BIN)/python examples/modelslim/modelslim.py --tool $(SLIM_VENV) --emulation $(NPU_VENV)

test: lint docs conformance
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# Chromium comes from the system's packages: installed here if that needs no password, else the line to run is printed
chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; \
	  else echo "Chromium is not installed; run: sudo apt-get install -y chromium" >&2; exit 1; fi; }

# pictures of the pages end in build/browser
test-browser: dev chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser/report_page.py

# the picture of docs/conformance.md: a run that fails, so that there is something to see
docs-picture: dev chromium
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m browser.picture docs/pictures/conformance-report.png

# broken links, anchors, file includes and docstring references are errors (under --quiet they would pass unseen)
docs: dev
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# what pages repeat from the code: interface, command line, outputs of commands
docs-update: dev
	$(BIN)/python docs/generate.py --console

# levels L0 (layouts), L1 (compiles) and L2 (interpreted) of the AMD backend; build/conformance/rocm/report.json has all
conformance-rocm: dev
	$(BIN)/python backends/rocm/levels.py --out build/conformance/rocm
	$(BIN)/python backends/rocm/matrix.py build/conformance/rocm --page docs/rocm.md --check

# L1: a tile of every kernel and format for NVIDIA's chips, with the newest Triton and with the oldest that is supported; and
# the calls of optional libraries, held against their text
COMPILE := $(BIN)/python -m qhal_triton.compile --jobs $(PYTEST_WORKERS)
NVIDIA := sm_80 sm_89 sm_90 sm_100 sm_120
OLDER := sm_80 sm_90 sm_120
AMD := gfx942 gfx950 gfx1201
OLDEST := build/triton-3.6.0
LIBRARIES := build/libraries
cuda-offline: dev $(OLDEST) $(LIBRARIES)
	$(BIN)/python -m qhal_cuda.contracts $(LIBRARIES)
	$(COMPILE) --arch $(NVIDIA) --json build/compile/nvidia.json
	PYTHONPATH=$(OLDEST) $(COMPILE) --arch $(OLDER) --cache build/triton-oldest --json build/compile/nvidia-oldest.json

$(OLDEST):
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0

# the optional libraries of the CUDA backend, to be read; nothing imports them from here
$(LIBRARIES):
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ \
	  $$($(BIN)/python -c "from qhal_cuda.libraries import LIBRARIES as all; print(*(f'{x.package}=={x.pinned}' for x in all))")

compile-full: dev $(OLDEST)
	$(COMPILE) --full --arch $(AMD) --json build/compile/amd-full.json
	$(COMPILE) --full --arch $(NVIDIA) --json build/compile/nvidia-full.json
	PYTHONPATH=$(OLDEST) $(COMPILE) --full --arch $(OLDER) --cache build/triton-oldest --json build/compile/oldest-full.json
	$(BIN)/python -m qhal_triton.page build/compile/amd-full.json build/compile/nvidia-full.json \
	  build/compile/oldest-full.json > docs/kernels.md
	$(BIN)/python backends/rocm/plans.py --page docs/rocm.md tests/golden $(QHAL_GOLDEN)

bench: dev
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
