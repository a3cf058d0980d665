# What a developer or a newcomer types. `make help` lists the targets; CONTRIBUTING.md tells more.
#
# The first target that is made sets up a virtual environment in $(VENV); later calls find it done (stamps in .make/).
# Variables:
#   PYTHON       the Python (3.11 or newer) to make the virtual environment with
#   TORCH_INDEX  address of a package index of CPU builds of torch; without it pip's own settings decide
#   TORCH        what to install where no torch >= 2.10 is there yet
#   NATIVE       which builds of the kernels' C++ tests to run
#   WORKERS      how many processes share the tests

PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3)
TORCH_INDEX ?=
TORCH ?= torch==2.13.0
VENV ?= .venv
NATIVE ?= plain
WORKERS ?= 2

BIN := $(VENV)/bin
FLOWER := $(VENV)-flower/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HAS_TORCH := -c "import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 10)" 2>/dev/null
comma := ,
SOURCES := $(wildcard setup.py MANIFEST.in csrc/*.* csrc/*/*.*)

.PHONY: help demo test test-jobs test-slow test-native fuzz test-cuda-logic gpu lint format types bench docs build clean setup setup-dev setup-mpi setup-hosts setup-docs setup-flower test-flower
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/  \1\t\2/' | expand -t 18

demo: setup  ## train a model three ways (dense, top-k, DGC) on 2 ranks; a table, a plot and a JSON file in runs/compare
	$(BIN)/distopt compare

test: setup  ## the tests that every change must pass (a few minutes)
	$(BIN)/python -m pytest -m "not slow and not job" -n $(WORKERS) --dist loadfile

test-jobs: setup  ## whole jobs under torchrun, mpirun and across network namespaces, faults among them; and builds
	$(BIN)/python -m pytest -m "job and not slow" -n $(WORKERS) --dist loadfile

test-slow: setup setup-flower  ## the full-length tests, those in Flower's environment among them
	$(BIN)/python -m pytest -m slow
	$(FLOWER)/python -m pytest -m slow tests/integrations/flower

test-native:  ## the kernels' C++ tests, without torch: NATIVE="plain asan tsan aarch64" (the last needs a cross compiler)
	$(MAKE) -C tests/native $(NATIVE)

fuzz:  ## arbitrary bytes as tensors, sizes and tables for the kernels: RUNS=10000; needs clang-14 and its libFuzzer
	$(MAKE) -C tests/native fuzz

test-cuda-logic: $(addprefix cuda-logic-,address$(comma)undefined thread none)  ## the CUDA kernels played on the CPU: results, accesses outside buffers, missing barriers

cuda-logic-%:
	bash tests/native/cuda_logic.sh "$(filter-out none,$*)" 40

gpu:  ## on a machine with a CUDA torch and nvcc: build, run the gpu tests, also under compute-sanitizer, and measure
	PYTHON=$(if $(filter command environment,$(origin PYTHON)),$(PYTHON)) bash .ci/gpu

lint: setup-dev  ## ruff, clang-format and bash's own check: nothing may be left to format or to mend
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run -Werror
	git ls-files '*.sh' '*.sbatch' .ci/run .ci/gpu | xargs -rn1 bash -n

format: setup-dev  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format -i

types: setup-dev  ## mypy, strict, on the package
	$(BIN)/mypy

bench: setup  ## the kernels' speed (a minute); the accuracy benchmark is benchmarks/accuracy.py
	$(BIN)/python benchmarks/compress.py

docs: setup setup-docs  ## the API reference, from the docstrings, in docs/api/_build; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -n docs/api docs/api/_build

build: setup  ## a wheel in dist/
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

setup-flower: .make/flower  ## an environment of its own, $(VENV)-flower: Flower pins what it needs tightly

test-flower: setup-flower  ## the Flower integration: types, rounds, whole jobs under its simulation engine and its SuperLink
	$(FLOWER)/mypy -p distopt.integrations.flower --follow-imports=silent
	$(FLOWER)/python -m pytest -m "not slow" tests/integrations/flower

setup-mpi: .make/mpi  ## mpi4py and Open MPI for the tests over mpirun, which are skipped without them

setup-docs: .make/docs  ## Sphinx for the API reference and its test, which is skipped without it

setup-hosts: .make/hosts  ## DeepSpeed, Accelerate, Lightning and transformers for their tests, which are skipped without them

clean:  ## remove what the other targets built, the virtual environment included; runs/ stays
	rm -rf $(VENV) $(VENV)-flower .make build dist docs/api/_build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find distopt -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +

setup: .make/package
setup-dev: .make/package .make/dev

# An environment that is there is used as it is.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "distopt needs Python 3.11 or newer, $(PYTHON) is not; use: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@if $(PYTHON) $(HAS_TORCH); then echo "using the torch that is installed"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# The build needs torch and setuptools in place (no isolation): an isolated build would fetch the newest CUDA torch.
.make/torch: | $(BIN)/python
	$(PIP) install -q --upgrade "pip>=24.2" "setuptools>=77" wheel "numpy>=1.26"
	@$(BIN)/python $(HAS_TORCH) || { echo "installing $(TORCH)"; \
	  $(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"; }
	@mkdir -p .make && touch $@

.make/package: .make/torch pyproject.toml $(SOURCES)
	@# setuptools warns whenever an editable install is made: that is what is asked for here
	PYTHONWARNINGS="ignore:Editable installation" $(PIP) install -q --no-build-isolation -e ".[cli,test]"
	@touch $@

# torch as above; what the tests need besides Flower is less than the extra `test`.
.make/flower: pyproject.toml $(SOURCES)
	@test -e $(FLOWER)/python || $(PYTHON) -m venv $(VENV)-flower
	$(FLOWER)/python -m pip --disable-pip-version-check install -q --upgrade "pip>=24.2" "setuptools>=77" wheel "numpy>=1.26"
	@$(FLOWER)/python $(HAS_TORCH) || { echo "installing $(TORCH)"; \
	  $(FLOWER)/python -m pip --disable-pip-version-check install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"; }
	PYTHONWARNINGS="ignore:Editable installation" $(FLOWER)/python -m pip --disable-pip-version-check install -q \
	  --no-build-isolation -e ".[flower]" pytest pytest-timeout hypothesis mypy scikit-learn
	@mkdir -p .make && touch $@

# What the extras list (`dev`, `mpi`, those of the hosts), without building the package once more.
.make/hosts: EXTRAS := deepspeed accelerate lightning transformers
.make/dev .make/mpi .make/docs .make/hosts: EXTRAS ?= $(@F)
.make/dev .make/mpi .make/docs .make/hosts: .make/torch pyproject.toml
	@$(BIN)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(line for extra in '$(EXTRAS)'.split() for line in project['optional-dependencies'][extra]), sep='\n')" > $@.txt
	$(PIP) install -q -r $@.txt
	@touch $@
