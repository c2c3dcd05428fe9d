# `make setup` makes .venv with everything; the other targets do that first, once.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SLOW_PLUGINS := plugins/refitkit-openvino

.PHONY: setup demo test test-more test-plugins test-matrix zoo zoo-aoti check bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/refitkit demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy $(wildcard plugins/*/src)
	$(BIN)/lint-imports
	$(BIN)/python scripts/structure.py --check

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=30
	$(BIN)/python scripts/plugin_wheels.py --kind source $(filter-out $(SLOW_PLUGINS),$(wildcard plugins/*))

# What make test leaves out: longer slices of the campaigns, tests that need diffusers or openvino,
# and new plugins of all kinds. The modules of tests/campaign say how to run all of them.
test-more: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,more]'
	$(BIN)/python -m pytest tests/unit/builtin/test_families.py
	$(BIN)/python -m tests.campaign.interrupts --count 200
	PYTHONPATH=plugins/refitkit-peft/src $(BIN)/python -m tests.campaign.kills --count 20
	PYTHONPATH=plugins/refitkit-peft/src $(BIN)/python -m tests.campaign.io_faults --count 60 --allocations 10
	$(BIN)/python -m tests.campaign.ambient
	$(BIN)/python scripts/plugin_wheels.py $(SLOW_PLUGINS)

# Each plugin's wheel in a fresh environment: installed, used, tested, uninstalled; and a new one.
test-plugins: setup
	$(BIN)/python scripts/plugin_wheels.py $(PLUGINS)

# Torch-TensorRT 2.11 to 2.14, each in an environment of its own: half an hour, 7 GB. Not in CI.
test-matrix: setup
	$(BIN)/python scripts/test_matrix.py $(MATRIX)

# Plans of many models against the reference's rebuild, and docs/zoo.md: about an hour. Resumes.
zoo: setup
	$(BIN)/python -m scripts.zoo --engines $(ZOO)

# Refits with AOTInductor against eager, and their part of docs/zoo.md: about an hour. Resumes.
# One row anew: make zoo-aoti ZOO="--only 'nn/lstm' --again --write".
zoo-aoti: setup
	$(BIN)/python -m scripts.zoo --backend aotinductor --workers 1 $(ZOO)

bench: setup
	$(BIN)/python benchmarks/aotinductor_refit.py
	$(BIN)/python benchmarks/recipe_vs_reference.py --quick

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
