.PHONY: demo test fuzz lint build docs gpu clean

ROOT   := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
VENV   := $(ROOT)/.venv
PYTHON ?= python3
# The version the project is developed on. Any torch >= 2.10 that .venv already holds is kept.
TORCH  ?= torch==2.13.0
EXTRAS ?= test
# The CUDA kernels are compiled where there is a GPU for them; "make build" does so wherever there is an nvcc.
MASKOPS_BUILD ?= $(if $(shell command -v nvidia-smi),auto,none)
RUN    := cd $(ROOT) && $(VENV)/bin/python

demo: $(VENV)/installed-$(EXTRAS)
	$(RUN) -m maskops demo $(ARGS)

# One process per core, with one thread each.
test: $(VENV)/installed-$(EXTRAS)
	export OMP_NUM_THREADS=1; $(RUN) -m pytest -n auto $(ARGS)

# Mutated and made-up files against every reader, for so long.
MINUTES ?= 10
fuzz: $(VENV)/installed-$(EXTRAS)
	export OMP_NUM_THREADS=1; cd $(ROOT)/tests && PYTHONPATH=.. $(VENV)/bin/python fuzz.py $(MINUTES)

lint: $(VENV)/installed-$(EXTRAS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	cd $(ROOT) && $(VENV)/bin/clang-format --dry-run -Werror csrc/* tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp

# Builds the wheel without isolation, so with the torch of .venv, installs it in an empty folder and imports it from there.
build: $(VENV)/installed-$(EXTRAS)
	rm -rf $(ROOT)/build/wheel $(ROOT)/build/site $(ROOT)/build/lib*
	cd $(ROOT) && PATH=$(VENV)/bin:$$PATH CMAKE_ARGS=-DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
	    $(VENV)/bin/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(RUN) -m pip install -q --no-deps --target build/site build/wheel/*.whl
	cd $(ROOT)/build && PYTHONPATH=site $(VENV)/bin/python -m maskops info

# The site, in build/docs. A link, an anchor or a reference that leads nowhere fails.
# Not --quiet: then --strict would not see the warnings either.
docs:
	$(MAKE) $(VENV)/installed-docs EXTRAS=docs
	cd $(ROOT) && NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# make gpu OUT=folder: on a CUDA machine, with the python3 that has torch and with no network.
gpu:
	PYTHON=$(PYTHON) sh $(ROOT)/benchmarks/gpu.sh $(or $(OUT),$(ROOT)/build/gpu)

clean:
	rm -rf $(ROOT)/build $(ROOT)/maskops.egg-info

$(VENV)/installed-$(EXTRAS): $(ROOT)/pyproject.toml
	$(VENV)/bin/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/python -m pip install $(TORCH)
	$(VENV)/bin/python -m pip install -q "setuptools>=77" cmake ninja "pybind11>=2.12"
	cd $(ROOT) && PATH=$(VENV)/bin:$$PATH MASKOPS_BUILD=$(MASKOPS_BUILD) $(VENV)/bin/python -m pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@
