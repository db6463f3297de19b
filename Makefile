# The same targets for people and for CI. `make` alone explains them.
.PHONY: help setup test test-fuzz test-engines test-models test-models-most lint format recipes check infer-quant bench-peers build clean

VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter that the project supports.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)

MODEL ?= demo
ADAPTER ?=
SUITE ?= $(if $(filter demo,$(ADAPTER)),demo-adapter,demo)
RECIPES ?= awq-w4-g128 gptq-w4-g128 nf4 gguf-q4-k-m
OUT ?= reports/infer-quant
BENCH ?=
ENGINES ?=
SEED ?=
ADAPTED = $(if $(ADAPTER),--adapter "$(ADAPTER)")
ARTIFACTS = $(foreach recipe,$(RECIPES),$(OUT)/artifacts/$(basename $(notdir $(recipe))))

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo 'make infer-quant MODEL=DIR ADAPTER=LORA_DIR RECIPES="awq-w4-g128 my.yaml" \'
	@echo '                 SUITE=my-suite.yaml OUT=DIR'
	@echo 'make bench-peers BENCH="--jobs gptq awq --peers llm-compressor --models 82m --runs 3 \'
	@echo '                        --out FILE.md" (BENCH=--help: all there is)'
	@echo 'make test-engines ENGINES="vllm transformers gptqmodel llama.cpp" RECIPES="nf4"'

setup: $(VENV)/.ready ## Make .venv with everything in it

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'Python 3.11, 3.12 or 3.13 is needed.' >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: setup ## Run the tests
	$(BIN)/python -m pytest

# Fifteen kinds of files, and a few seconds to make them: three minutes.
test-fuzz: setup ## Damage files of every kind for three minutes: no command may crash on one
	@seed=$(SEED); seed=$${seed:-$$(date +%s)}; echo "make test-fuzz SEED=$$seed"; \
	QUANTKIT_FUZZ_SECONDS=11 QUANTKIT_FUZZ_SEED=$$seed $(BIN)/python -m pytest tests/cli/test_fuzz.py

test-engines: setup ## Run artifacts in vLLM, transformers and llama.cpp: docs/compatibility.md
	$(BIN)/python -m tests.compatibility.run $(if $(ENGINES),--engines $(ENGINES)) \
		$(if $(filter command,$(origin RECIPES)),--recipes $(RECIPES))

test-models: setup ## Try every model type of transformers: docs/models.md
	$(BIN)/python -m benchmarks.model_types

test-models-most: setup ## Try the twenty model types that people quantize most
	$(BIN)/python -m benchmarks.model_types --most

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

recipes: setup ## Check that no published recipe or suite has changed
	$(BIN)/quantkit recipes check

check: lint recipes test ## Everything that a change must pass

infer-quant: setup ## Quantize MODEL by RECIPES, judge by SUITE, end in one table under OUT
	@set -e; for recipe in $(RECIPES); do \
		name=$$(basename "$$recipe" .yaml); \
		$(BIN)/quantkit quantize "$$recipe" --model "$(MODEL)" $(ADAPTED) \
			--out "$(OUT)/artifacts/$$name" --force; \
	done
	@$(BIN)/quantkit compare $(ARTIFACTS) --baseline "$(MODEL)" $(ADAPTED) \
		--suite "$(SUITE)" --out "$(OUT)"

bench-peers: setup ## Time quantkit and its peers at the same jobs, in benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.peers $(BENCH)

build: setup ## Build the wheel and the source distribution
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build

clean: ## Remove what the targets made
	rm -rf $(VENV) .venv-peers .venv-engines reports dist build .pytest_cache .mypy_cache .ruff_cache
