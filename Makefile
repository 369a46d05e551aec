# Everything starts here: `make run`, `make test`. Each target sets up what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/miniature.yaml
# Options of set-up: make setup BUILD=cuda PYTHON=/usr/bin/python3.12 TORCH_INDEX=URL
BUILD ?=
PYTHON ?=
TORCH_INDEX ?=
# Further arguments: make run ARGS="--set grpo.max_steps=20", make test ARGS="-k answers"
ARGS ?=

.PHONY: help setup run test lint types check lock docs bench bench-serving clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv from the committed lock (cpu or cuda, by the machine)
	@command -v python3 >/dev/null || { echo "Missing: Python (apt-get install python3.11 python3.11-venv)." >&2; exit 7; }
	@python3 scripts/setup.py $(if $(BUILD),--build $(BUILD)) $(if $(PYTHON),--python $(PYTHON)) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX))

run: setup ## run the whole pipeline of configs/miniature.yaml
	@$(BIN)/avrt run --config $(CONFIG) $(ARGS)

# Tests run in two processes, of which each starts one engine at most. A GPU is not shared: there they run in one.
WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)
test: setup ## run all tests: unit, integration, end to end (WORKERS=0: in one process)
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: setup ## style and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup ## static types
	@$(BIN)/mypy

check: lint types test ## what CI runs

lock: setup ## resolve requirements/cpu.lock and requirements/cuda.lock anew (ARGS=--upgrade for newer versions)
	@$(BIN)/python scripts/lock.py $(ARGS)

docs: setup ## bring the generated part of docs/fidelity.md up to date
	@$(BIN)/python scripts/docs.py

bench: setup ## measure the parts that bound a run
	@for script in benchmarks/*.py; do $(BIN)/python "$$script" || { code=$$?; [ $$code -eq 77 ] || exit $$code; }; done

bench-serving: setup ## load our server and a bare `vllm serve` side by side (docs/serving.md; ARGS="--model DIR --rounds 6")
	@$(BIN)/python benchmarks/serving.py $(ARGS)

.PHONY: images push pin-images
# Options: make images VARIANT=cuda BASE=debian:12 BUILD_BASE=… TORCH_INDEX=URL SOURCE=URL
images: setup ## build the container images (docs/images.md); VARIANT=cpu or cuda
	@$(BIN)/python -m scripts.images build $(foreach name,VARIANT BASE BUILD_BASE TORCH_INDEX SOURCE,$(if $($(name)),--$(shell echo $(name) | tr 'A-Z_' 'a-z-') "$($(name))"))

push: setup ## push them: make push REGISTRY=registry.example.com/team
	@$(BIN)/python -m scripts.images push --registry "$(or $(REGISTRY),$(error make push needs REGISTRY=registry.example.com/team))"

pin-images: setup ## write the digests of images.yaml, as its registries serve them now
	@$(BIN)/python -m scripts.registry

.PHONY: manifests cluster-api-test cluster-test cluster-test-slow
manifests: setup ## render every overlay and check it (ARGS=--release refuses images by tag; docs/manifests.md)
	@$(BIN)/python -m scripts.manifests $(ARGS)

cluster-api-test: setup ## the manifests against the API server of KUBECONFIG
	@$(BIN)/python -m pytest tests/manifests/test_api.py $(ARGS)

cluster-test: setup ## the cluster tests against KUBECONFIG; AVRT_STANDIN_IMAGE for those of serving (docs/serving.md)
	@$(BIN)/python -m pytest tests/cluster tests/manifests -m "not slow_cluster" $(ARGS)

cluster-test-slow: setup ## what needs KServe's deadline of ten minutes
	@$(BIN)/python -m pytest tests/cluster -m slow_cluster $(ARGS)

clean: ## delete .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
