# make train     install, then train (ARGS="model=mlp trainer.max_epochs=3" passes overrides)
# make test      install what the tests need, then run them
# make check     formatting, lint, types, direction of imports, wording
# make docs      build the site of docs/ into build/site, warnings being errors
# make bench-loop, bench-data, bench-checkpoint, bench-dcp, bench-s3   ratios against named rivals
# make chaos     kill a real training at KILLS random instants; nothing may be lost. STORE=s3: in a
#                bucket, and its server too
# make s3       a real S3 server on this machine, to try things
# make slurm, make slurm-down    a real SLURM of two nodes on this machine, to try things (as root)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS ?=
KILLS ?= 100

.PHONY: train test test-cluster check docs format chaos clean
.PHONY: bench-loop bench-data bench-checkpoint bench-dcp bench-s3
.PHONY: s3 slurm slurm-down

train: $(VENV)/.installed
	@$(BIN)/python -m trainer.run $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not cluster and not slow" $(ARGS)

test-cluster: $(VENV)/.installed-test
	$(BIN)/python -m pytest -v -n 2 --dist worksteal -m "cluster or slow" $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/check_words.py

docs: $(VENV)/.installed-test
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

bench-loop: $(VENV)/.installed
	$(BIN)/python scripts/bench_loop.py $(ARGS)

bench-data: $(VENV)/.installed-test
	$(BIN)/python scripts/bench_data.py $(ARGS)

bench-checkpoint: $(VENV)/.installed-test
	$(BIN)/python scripts/bench_checkpoint.py $(ARGS)

bench-dcp: $(VENV)/.installed
	$(BIN)/python scripts/bench_dcp.py $(ARGS)

bench-s3: $(VENV)/.installed-test
	@$(PIP) obstore
	$(BIN)/python scripts/bench_s3.py $(ARGS)

chaos: $(VENV)/.installed$(if $(filter s3,$(STORE)),-test)
	$(BIN)/python -m scripts.$(if $(filter s3,$(STORE)),chaos_s3,chaos) --kills $(KILLS) $(ARGS)

s3: $(VENV)/.installed-test
	@$(BIN)/python scripts/s3_server.py $(ARGS)

slurm:
	@scripts/slurm_cluster up -N 2

slurm-down:
	@scripts/slurm_cluster down

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch is large; once)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing into $(VENV) (torch is large; once)"
	@$(PIP) --editable '.[test,dev]'
	@touch $@ $(VENV)/.installed
