# Each target sets up what it needs in .venv and is quick the second time.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORE   := $(VENV)/.core
DEV    := $(VENV)/.dev
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test browser lint format bench bench-images bench-ray bench-learn heads screenshots clean
.DEFAULT_GOAL := test

$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "aesthetic-filter needs Python 3.11 or later; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "setting up $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing aesthetic-filter into $(VENV) (the first time takes a minute)"
	@$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	@echo "installing the development tools into $(VENV) (the first time takes some minutes)"
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")' > $(VENV)/dev.txt
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[clip,ray,s3,web,learn]' -r $(VENV)/dev.txt
	@touch $@

demo: $(CORE)       ## score the sample, filter it, show the result
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh

test: $(DEV) browser  ## the whole test suite, a file at a time in each of two processes
	@$(BIN)/python -m pytest -n 2 --dist loadfile

browser:            # Chromium, in which the tests look at the pages
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  command -v google-chrome >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing chromium (the first time takes a minute)"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
	      --no-install-recommends chromium fonts-dejavu-core >/dev/null || \
	      echo "chromium could not be installed: the tests of the pages are skipped" >&2; \
	  else echo "no Chromium: the tests of the pages are skipped; install chromium to run them" >&2; fi; }

lint: $(DEV)        ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV)      ## rewrite the code in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(DEV)       ## speed, side by side, on this machine: a table, and bench.json
	@$(BIN)/python benchmarks/bench.py --json bench.json

bench-images: $(DEV)  ## speed of embedding images on this machine: a table, and bench-images.json
	@$(BIN)/python benchmarks/bench_images.py --json bench-images.json

bench-ray: $(DEV)   ## the same work on this machine and on Ray: a table, and bench-ray.json
	@$(BIN)/python benchmarks/bench_ray.py --json bench-ray.json $(if $(NEMO_PYTHON),--reference-python $(NEMO_PYTHON))

bench-learn: $(DEV) ## speed of reports, calibration, training and comparing, and bench-learn.json
	@$(BIN)/python benchmarks/bench_learn.py --json bench-learn.json

heads: $(DEV)       ## fold the bundled heads again from their published checkpoints
	@$(BIN)/python scripts/build_heads.py $(CHECKPOINTS)

screenshots: $(DEV) browser  ## the pictures in the README and in docs/look.md
	@$(BIN)/python scripts/screenshots.py

clean:              ## remove everything the other targets made
	@rm -rf $(VENV) demo bench.json bench-images.json bench-ray.json bench-learn.json build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
