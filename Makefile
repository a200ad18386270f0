# Each target first sets up a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
FIXTURE ?= tests/fixtures/official_a.safetensors
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-busy test-oldest lint bench docs release clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: .venv/installed ## encode the emoji, train the demo recipe, sample a captioned grid and measure it
	@bash examples/demo.sh $(BIN)/microdit

test: .venv/installed lint ## lint, types, and every test that is not slow
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

test-slow: .venv/installed ## the tests that take minutes
	$(BIN)/pytest -m slow

test-busy: .venv/installed ## the tests beside two busy processes: none may depend on the machine's load
	@for i in 1 2; do $(BIN)/python -c "while True: pass" & pids="$$pids $$!"; done; trap "kill $$pids" EXIT; \
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[demo,dev]' torchvision  # image processors need it before transformers 5.17
	@touch $@

test-oldest: .venv-oldest/installed ## the tests with the oldest versions that pyproject.toml allows (torch alone is several GB)
	.venv-oldest/bin/pytest -n auto --maxprocesses 4 --dist worksteal

lint: .venv/installed ## ruff (format and lint) and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/installed ## parity with the authors' code and MiniT2I's, and speed against this machine's own peak
	$(BIN)/python benchmarks/official_parity.py $(FIXTURE)
	$(BIN)/python benchmarks/minit2i_parity.py tests/fixtures/minit2i_a.safetensors
	$(BIN)/python benchmarks/train_step.py --size tiny --batch 16 --mask 0.75

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: .venv/docs-installed ## build the documentation's site into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Written: site/index.html. With search: $(BIN)/python -m http.server -d site"

release: ## build wheel and source distribution into dist/ and check them; uploads nothing
	@PYTHON=$(PYTHON) bash .ci/release

clean: ## remove environments, data, runs, and what was built
	rm -rf .venv .venv-oldest .venv-release build data dist runs site
