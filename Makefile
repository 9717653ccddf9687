# Every target makes the environment it needs: a Python, a C++ compiler and a package index are enough.
# pip takes its index and PIP_FIND_LINKS from the environment.

VENV         ?= .venv
# The pinned versions want Python 3.11 or newer; the library itself runs on 3.10.
PYTHON       ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(if $(shell $(p) -c $(NEW_ENOUGH) 2>/dev/null && echo yes),$(p))))
PYTEST_ARGS  ?= -n 2
TEST_THREADS ?= 1

PY         := $(VENV)/bin/python
PIP        := $(PY) -m pip
NEW_ENOUGH := 'import sys; sys.exit(sys.version_info < (3, 11))'
INSTALLED  := $(VENV)/.installed
OPENMMLAB  := $(VENV)/.openmmlab
PYTEST     := OMP_NUM_THREADS=$(TEST_THREADS) $(PY) -m pytest $(PYTEST_ARGS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
.DEFAULT_GOAL := help
.PHONY: help install demo demo-det demo-seg demo-unet test test-all test-clients lint format type bench docs wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the pinned requirements and this library in editable mode

demo: $(INSTALLED) ## train Vim on scanned digits (or go on where it stopped) and test the best checkpoint
	$(PY) -m ssm_backbones demo

demo-det: $(INSTALLED) $(OPENMMLAB) ## train VMamba with Mask R-CNN on digits in photographs, test it, draw what it finds
	$(PY) -m ssm_backbones demo detection

demo-seg: $(INSTALLED) $(OPENMMLAB) ## train EfficientVMamba with UPerNet on digits in photographs, test it, draw what it finds
	$(PY) -m ssm_backbones demo segmentation

demo-unet: $(INSTALLED) $(OPENMMLAB) ## train a U-Net on VMamba to find epithelium in tissue, test it, draw what it finds
	$(PY) -m ssm_backbones demo unet

test: $(INSTALLED) $(OPENMMLAB) ## run the tests that are not marked slow
	$(PYTEST)

test-all: $(INSTALLED) $(OPENMMLAB) ## run every test but those of other programs
	$(PYTEST) -m "not clients"

test-clients: $(INSTALLED) ## install the programs of requirements/clients.txt and run them on our models
	$(PIP) install -r requirements/clients.txt
	$(PYTEST) -m clients tests/clients

lint: $(INSTALLED) ## check style and formatting, and that what is generated is up to date
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/model_cards.py --check

format: $(INSTALLED) ## apply the formatting and the fixes that are safe
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

type: $(INSTALLED) ## check types
	$(PY) -m mypy

bench: $(INSTALLED) ## time the selective-scan backends against a textbook loop
	$(PY) tools/benchmark.py op

docs: $(INSTALLED) ## write model cards, tables and metafiles, check links, build the site into site/
	$(PY) tools/model_cards.py
	$(PY) -m pytest tests/test_packaging.py -k markdown
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

wheel: $(INSTALLED) ## build a wheel into dist/
	$(PIP) wheel . --no-deps --no-build-isolation --wheel-dir dist

clean: ## remove builds and caches; the environment, data and runs stay
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache $(INSTALLED) $(OPENMMLAB)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
	find backbones -name '*.so' -delete

# Two stamps: an edit of the kernel rebuilds it without asking the index for anything. An environment that is
# already there is adopted, for pip installs nothing that is satisfied.
$(VENV)/.requirements: $(wildcard requirements/*.txt)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c $(NEW_ENOUGH); then \
	        echo "Python 3.11 or newer is needed$(if $(PYTHON), and '$(PYTHON)' is not); say 'make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'." >&2; \
	        exit 1; \
	    fi; \
	    $(PYTHON) -m venv $(VENV); \
	fi
	@$(PY) -c $(NEW_ENOUGH) || { echo "$(VENV) has $$($(PY) -V); remove it, Python 3.11 or newer is needed." >&2; exit 1; }
	$(PIP) install -r requirements/dev.txt
	@touch $@

# mmcv comes without compiled operators, for which torchvision's stand in, unless pip finds a wheel that has them. Its
# opencv-python wants display libraries: the headless build, which owns the same files, goes back over it.
$(OPENMMLAB): $(VENV)/.requirements
	$(PIP) install -r requirements/mm.txt
	$(PIP) install --no-deps --force-reinstall $$(grep '^opencv-python-headless==' requirements/train.txt)
	@touch $@

$(INSTALLED): $(VENV)/.requirements setup.py backbones/__init__.py $(wildcard backbones/ops/csrc/*)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
