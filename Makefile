# On a bare machine with Python 3.11 or newer, git and make: `make demo`, then `make test`.
#
# Each may be given on the command line or in the environment:
#   PYTHON       the interpreter that creates the environment
#   VENV         where the environment lives
#   JOBS         how many pytest workers
#   PYTEST_ARGS  more arguments for pytest: a path, -k NAME, -x
#   TORCH        the torch to test against; an empty value leaves torch out
#   TORCH_INDEX  a package index to take torch from, where the default one serves a build with CUDA
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
TORCH ?= $(shell grep '^torch==' constraints.txt)
TORCH_INDEX ?=

BIN := $(VENV)/bin
comma := ,
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check
PIP_FAILED := { echo "error: the installation failed; pip's message is above. After lines of 'Retrying' it means that" \
	"no package index answered: check the network or pip's index settings, then run make again." >&2; exit 1; }

QUICK_TESTS := $(wildcard $(addprefix tests/core/test_,lifecycle*.py allocate.py commands.py site.py policies.py \
	policy_contract.py governor.py grafting.py forward.py)) tests/packaging/test_house_rules.py tests/benchmarks

DEV_EXTRAS := dev$(if $(TORCH),$(comma)integrations)

.NOTPARALLEL: # two pip runs must not share one environment
.PHONY: help demo notebooks quick test test-all lint format install install-dev clean FORCE

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

demo: install ## grow a network on scikit-learn's digits and write the report to runs/demo
	@echo "==> growing a network on the digits data set"
	$(BIN)/esper grow --data digits --repeat 10 --out runs/demo --overwrite

test: lint ## check format, lint, types and layers, then run the tests
	@echo "==> pytest"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 25 --durations-min 2 $(PYTEST_ARGS)

quick: install-dev ## format, lint and the tests of the core that take no training, in about a minute
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(QUICK_TESTS)

test-all: lint ## the same with the long tests, and programs compiled as for users
	@echo "==> pytest, long tests included"
	TEST_OPTIMISED=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow or not slow" $(PYTEST_ARGS)

lint: install-dev ## check format, lint, types and layers
	@echo "==> ruff, mypy, import-linter"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install-dev ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.demo-installed ## install what the demo needs
install-dev: $(VENV)/.dev-installed ## install what the tests need

notebooks: install-dev ## run the notebooks and write them with their outputs
	$(BIN)/python tests/notebooks/render.py

clean: ## remove the environment, caches and build outputs; runs/ stays
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: PYTHON=$(PYTHON) is missing or older than Python 3.11. Name another," \
			"as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) -m venv failed;" \
		"some systems ship it apart (Debian: python3-venv)." >&2; exit 1; }
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "==> installing esper-fn[cli] (a minute or two the first time)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[cli]' || $(PIP_FAILED)
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/.torch-installed
	@echo "==> installing esper-fn[$(DEV_EXTRAS)] (a minute or two the first time)"
	@$(PIP_INSTALL) -c constraints.txt -e '.[$(DEV_EXTRAS)]' || $(PIP_FAILED)
	@touch $@ $(VENV)/.demo-installed

# torch goes in first, so that no later requirement chooses another build of it.
$(VENV)/.torch-installed: $(VENV)/.torch-choice
	@echo "==> $(if $(TORCH),installing $(TORCH),leaving torch out: TORCH is empty)"
	@$(if $(TORCH),$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)' || $(PIP_FAILED))
	@touch $@

$(VENV)/.torch-choice: FORCE | $(VENV)/.created
	@[ "$$(cat $@ 2>/dev/null)" = '$(TORCH) $(TORCH_INDEX)' ] || echo '$(TORCH) $(TORCH_INDEX)' > $@
