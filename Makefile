# Thin: every target is a command that you can type yourself.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/cdiv_tiny.yaml
EXTRACT_CONFIG ?= configs/extract/cdiv.yaml

export PATH := $(abspath $(VENV))/bin:$(PATH)
INSTALLED := $(VENV)/installed
# Options of a sweep. Without STORE or BASE, it runs on sample photographs, to show that it works.
STORE ?=
BASE ?=
SEEDS ?= 0
JOBS ?= $(if $(STORE)$(BASE),1,2)
LAUNCHER ?= local
# Set if a quickstart was interrupted or is repeated: it then goes on from its last checkpoint.
RESUME = $(if $(wildcard runs/quickstart/config.yaml), --ckpt_path last)

.PHONY: help install quickstart extract fit ablate-teachers cortexbench bench bench-gpu docs lint format test

help:
	@echo "make quickstart   install, then extract, train and test on sample photographs (offline, a few minutes)"
	@echo "make test         check format, lint, types and import contracts, then run the tests"
	@echo "make install      make a virtual environment in $(VENV), with everything that the checks need"
	@echo "make extract      theia extract --config EXTRACT_CONFIG=$(EXTRACT_CONFIG) --images IMAGES=DIR"
	@echo "make fit          theia fit --config CONFIG=$(CONFIG)"
	@echo "make ablate-teachers"
	@echo "                  compare the paper's 13 sets of teachers: STORE=FOLDER BASE=CONFIG SEEDS=0,1,2 JOBS=1 LAUNCHER=local;"
	@echo "                  with nothing set, on sample photographs, to see it work (offline, about 10 minutes)"
	@echo "make cortexbench  let two policies act in a simulator, to see it work (needs OpenGL; the simulator is installed)"
	@echo "make bench        measure how fast it is here, beside other ways to do the same (CPU, about 5 minutes)"
	@echo "make bench-gpu    the same on one GPU (ends within 8 minutes, and names what was left out)"
	@echo "make docs         build the documentation as a site: site/index.html"
	@echo "make lint         what 'make test' checks first: format, lint, types, import contracts"
	@echo "make format       rewrite the code to pass ruff"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --editable '.[dev]'
	@touch $@

# make prints each command before it runs it.
quickstart: $(INSTALLED)
	theia extract --config configs/extract/quickstart.yaml
	theia fit --config configs/quickstart.yaml$(RESUME)
	theia test --config configs/quickstart.yaml --ckpt_path runs/quickstart/checkpoints/best.ckpt

extract: $(INSTALLED)
	theia extract --config $(EXTRACT_CONFIG) --images $(or $(IMAGES),$(error Say where the images are: make extract IMAGES=DIR))

fit: $(INSTALLED)
	theia fit --config $(CONFIG)

ablate-teachers: $(INSTALLED)
ifeq ($(STORE)$(BASE),)
	@echo "No STORE= is given, so this uses small teachers with random weights on sample photographs. They carry no"
	@echo "knowledge; it only shows that the sweep works."
	theia extract --config configs/extract/samples.yaml
	theia ablate --config configs/ablations/teachers.yaml --base configs/samples.yaml --out runs/ablations/samples \
	  --seeds $(SEEDS) --jobs $(JOBS) --launcher $(LAUNCHER)
else
	theia ablate --config configs/ablations/teachers.yaml $(if $(BASE),--base $(BASE)) \
	  $(if $(STORE),--data.store $(STORE)) --seeds $(SEEDS) --jobs $(JOBS) --launcher $(LAUNCHER)
endif

cortexbench: $(INSTALLED)
	pip install --quiet --editable '.[dev,simulation]'
	python -m benchmarks.cortexbench collect --tasks drawer-open --episodes 2 --size 128 --pictures image \
	  --out runs/cortexbench/demonstrations
	python -m benchmarks.cortexbench run --encoders blind random:theia_tiny --data runs/cortexbench/demonstrations \
	  --preset smoke --out runs/cortexbench/policies

bench: $(INSTALLED)
	python -m benchmarks.throughput

bench-gpu: $(INSTALLED)
	python -m benchmarks.throughput gpu

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

lint: $(INSTALLED)
	ruff format --check
	ruff check
	mypy
	lint-imports

format: $(INSTALLED)
	ruff format
	ruff check --fix

test: lint
	pytest -m "not gpu and not network" --numprocesses 2
