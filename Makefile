# One command each: `make demo` and `make test` do all their own set-up.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: setup demo test lint clean browser slurm

setup: .venv/.installed

# Debian's python3 comes without venv; everything else is in wheels.
.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12)' 2>/dev/null || \
		{ echo "VideoAR needs Python 3.11 or 3.12: install one and run 'make PYTHON=python3.11 setup'." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "installing python3-venv"; \
		$$( [ "$$(id -u)" = 0 ] || echo sudo ) apt-get -qq update && \
		$$( [ "$$(id -u)" = 0 ] || echo sudo ) apt-get -qq install -y --no-install-recommends python3-venv; }
	$(PYTHON) -m venv .venv
	@echo "installing the pinned requirements (some 6 GB; a few minutes)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps nvidia-resiliency-ext==0.4.1 --editable .
	@touch $@

demo: setup
	$(BIN)/videoar demo --config pretrain/configs/demo/demo.yaml --out $(OUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

# the page of `videoar serve` is tested in a real browser (300 MB); without one those tests are skipped and say so
browser:
	@command -v chromium chromium-browser >/dev/null 2>&1 || { \
		echo "installing chromium"; \
		{ $$( [ "$$(id -u)" = 0 ] || echo sudo ) apt-get -qq update && \
		$$( [ "$$(id -u)" = 0 ] || echo sudo ) apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || \
		echo "chromium can't be installed: the page's tests will be skipped" >&2; }

# `videoar submit` is tested on a real SLURM with emulated nodes (30 MB); without one those tests are skipped and say so
slurm:
	@PATH="$$PATH:/usr/sbin" command -v slurmctld >/dev/null 2>&1 || { \
		echo "installing SLURM"; \
		{ $$( [ "$$(id -u)" = 0 ] || echo sudo ) apt-get -qq update && \
		$$( [ "$$(id -u)" = 0 ] || echo sudo ) env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
			slurmctld slurmd slurm-client munge >/dev/null; } || \
		echo "SLURM can't be installed: the tests of videoar submit on it will be skipped" >&2; }

# two workers with a thread each: the tests are made for 2 cores
test: lint browser slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv .pytest_cache .ruff_cache videoar.egg-info
