# Everything that is done with this checkout; `make help` lists it. Python 3.11 or newer and make are enough for
# `make demo`; what the services need is in tests/services/install.py.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PYTHON := $(VENV)/bin/python
RUN := $(VENV)/.run-installed
DEV := $(VENV)/.dev-installed
INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check
SERVICES := $(PYTHON) -m tests.services
ON_STORE := $(if $(STORE),--store "$(STORE)")
START := $(if $(DURABLE),--durable) $(ON_STORE)
COMPILE := $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(RUN) ## The main job on the embedded default, from nothing, with real files
	@$(PYTHON) -m tests.demo

.PHONY: test
test: lint chart ## Everything against embedded and real adapters; starts and stops the services; STORE=minio|seaweedfs
	@$(SERVICES) run $(ON_STORE) -- $(PYTHON) -m pytest -n 3 --dist loadfile -m "not endurance" --ignore=tests/chart --durations=30

.PHONY: test-fast
test-fast: lint ## Lint, types and the quick tests of parts that need no service
	@$(PYTHON) -m pytest -n 2 --dist loadfile -m "not services and not processes and not slow and not endurance" tests/unit tests/contract

.PHONY: endurance
endurance: $(DEV) ## The tests that take long, then the others on SeaweedFS; FUZZ_SECONDS=seconds for each decoder (600)
	@$(SERVICES) run -- $(PYTHON) -m pytest -m endurance --timeout=0
	@$(SERVICES) run --store seaweedfs -- $(PYTHON) -m pytest -n 2 --dist loadfile -m "services and not endurance" --ignore=tests/chart

.PHONY: schemas
schemas: $(DEV) ## Whether all versions of all events can be read beside each other, each with its golden files
	@$(PYTHON) -m tests.schema_versions

.PHONY: fuzz
fuzz: $(DEV) ## Decoders tried by a guided fuzzer (Linux, x86-64); DURATION=seconds for each (60), ONLY=name for one
	@$(PYTHON) -m tests.fuzz $(if $(DURATION),--seconds $(DURATION)) $(if $(ONLY),"$(ONLY)")

.PHONY: torture
torture: $(DEV) ## Random faults under load, then the oracle; DURATION=seconds (60), SEED=number to repeat, ONLY=kind
	@$(PYTHON) -m tests.faults.torture $(if $(DURATION),--duration $(DURATION)) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only "$(ONLY)")

.PHONY: bench
bench: $(DEV) ## The benchmarks, each against its baseline in one run; ONLY=NAME for one, STORE=minio|seaweedfs (docs/benchmarks.md)
	@$(SERVICES) run --durable $(ON_STORE) -- $(PYTHON) -m benchmarks $(ONLY)

.PHONY: lint
lint: $(DEV) ## Ruff and mypy --strict on everything
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@$(VENV)/bin/mypy

.PHONY: chart
chart: $(DEV) ## The Helm chart: linted, rendered, validated
	@$(PYTHON) -m tests.chart

.PHONY: image
image: $(DEV) ## The container image, built and tried, its bill of materials in var/; TAG=NAME:TAG; needs Docker or podman
	@$(PYTHON) -m tests.image $(if $(TAG),--tag "$(TAG)")

.PHONY: services
services: $(DEV) ## Start Kafka, the store and PostgreSQL on free ports; STORE=minio|seaweedfs, DURABLE=1 to sync PostgreSQL to disk
	@$(SERVICES) start $(START)

.PHONY: services-stop
services-stop: $(DEV) ## Stop them, delete their data and var/state
	@$(SERVICES) stop

.PHONY: run
run: $(DEV) ## The whole product on the real services, until interrupted
	@$(SERVICES) run $(START) -- sh -c \
		'set -a && . ./var/services.env && set +a && $(VENV)/bin/artifact-store migrate && exec $(VENV)/bin/artifact-store serve'

.PHONY: setup
setup: $(DEV) ## The virtual environment for development, in .venv

.PHONY: docs
docs: $(DEV) ## The pages that are generated: the catalogues of events and metrics, the settings, the chart's README
	@$(PYTHON) -m schemas.catalogue > docs/events.md
	@$(PYTHON) -m services.config > docs/settings.md
	@$(PYTHON) -m services.runtime.metrics > docs/metrics.md
	@$(PYTHON) -m tests.chart.readme > helm/artifact-store/README.md

.PHONY: lock
lock: $(DEV) ## Lock the dependencies again; UPGRADE=1 for newer versions
	@$(COMPILE) $(if $(UPGRADE),--upgrade) requirements/build.in -o requirements/build.txt
	@$(COMPILE) $(if $(UPGRADE),--upgrade) requirements/sbom.in -o requirements/sbom.txt
	@$(COMPILE) $(if $(UPGRADE),--upgrade) pyproject.toml -o requirements/run.txt
	@$(COMPILE) $(if $(UPGRADE),--upgrade) -c requirements/run.txt --extra traces pyproject.toml -o requirements/traces.txt
	@$(COMPILE) $(if $(UPGRADE),--upgrade) -c requirements/traces.txt --extra dev --extra traces pyproject.toml -o requirements/dev.txt

# --- the virtual environment: made once, filled again when a lock file changes ---

# A distribution's interpreter is built with profile-guided optimization; one that was built by hand often is not, and is
# slower by a sixth (docs/benchmarks.md). PYTHON3=NAME chooses another.
$(PYTHON):
	@for name in $(or $(PYTHON3),/usr/bin/python3 python3 python3.13 python3.12 python3.11 python3.14); do \
		$$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec $$name -m venv $(VENV); \
	done; \
	echo "Python 3.11 or newer with its venv module is needed (Debian: apt-get install python3-venv);" \
		"found: $$(python3 --version 2>/dev/null || echo none)" >&2; exit 1

# The lock files hold everything, the tool that builds the editable installation included: --no-index proves it.
$(RUN): requirements/build.txt requirements/run.txt pyproject.toml | $(PYTHON)
	@echo "installing into $(VENV) …"
	@$(INSTALL) --require-hashes -r requirements/build.txt -r requirements/run.txt
	@$(INSTALL) --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(DEV): requirements/dev.txt $(RUN)
	@$(INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@
