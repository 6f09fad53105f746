# Each goal sets up all it needs in .venv, from nothing but a Python of at least 3.11.
#   make demo    escrow, provider and buyer as processes, buying for real
#   make test    everything that must hold: ruff, mypy, pytest
#   make check   ruff and mypy only
#   make long    the tests again, with many more examples and kills
#   make sim     ten thousand simulated worlds (SEEDS=1000; SEED=17 replays one, with its trace)
#   make faults  thousands of kills and faults (SEED=sqlite:7/42 replays one); about an hour
#   make fuzz    coverage-guided fuzzing of decoders and services; about ten minutes (ARGS=--help)
#   make bench   peers and ourselves, side by side; about ten minutes (QUICK=1: one)

# A python that is only a version manager's stub does not run, so each one is tried.
SYSTEM_PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/ready
BENCH := .venv-bench

.PHONY: demo test check long sim faults fuzz bench clean

demo: $(READY)
	$(BIN)/x402mw demo

test: check
	$(BIN)/pytest -q tests/core --cov --cov-fail-under=100
	$(BIN)/pytest -q --ignore=tests/core -n 2

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

long: $(READY)
	X402MW_LONG=1 $(BIN)/pytest -q -n 2 --dist worksteal -o faulthandler_timeout=3600

sim: $(READY)
	PYTHONPATH=client:. $(BIN)/python -m tests.simulation $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),10000)) $(ARGS)

faults: $(READY)
	PYTHONPATH=client:. $(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED)) $(ARGS)

fuzz: $(READY)
	@$(BIN)/python -c "import atheris" 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	PYTHONPATH=client:. $(BIN)/python -m tests.fuzz.run $(ARGS)

# The peers live in an environment of their own: nothing else here needs them.
bench: $(BENCH)/ready
	$(BENCH)/bin/python -m bench $(if $(QUICK),--scale quick,--page docs/performance.md) $(ARGS)

$(BENCH)/ready: pyproject.toml
	@test -n "$(SYSTEM_PYTHON)" || { echo "x402mw needs Python 3.11 or newer" >&2; exit 1; }
	@test -x $(BENCH)/bin/python || $(SYSTEM_PYTHON) -m venv $(BENCH)
	@echo "setting up $(BENCH) (once) ..."
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

$(READY): pyproject.toml
	@test -n "$(SYSTEM_PYTHON)" || { echo "x402mw needs Python 3.11 or newer" >&2; exit 1; }
	@test -x $(BIN)/python || $(SYSTEM_PYTHON) -m venv .venv
	@echo "setting up .venv (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf .venv $(BENCH) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
