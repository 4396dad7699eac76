# Everything runs in .venv, which each target makes from nothing: only python3 (3.11 or later), a C compiler and
# make are needed. Nothing is downloaded but Python packages.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
FOLDERS := frontend passes schedules targets
SOURCES := pumice $(FOLDERS) tests bench

.PHONY: demo bench test test-slow lint format clean

demo: .venv/demo.stamp
	$(BIN)/pumice demo --out out/demo

# Out of the packages that are installed, no other data. BENCH_OPTIONS='--seconds 5' for a short look.
bench: .venv/bench.stamp
	$(BIN)/python -m bench.machine
	$(BIN)/python -m bench.layers $(BENCH_OPTIONS)
	$(BIN)/python -m bench.networks_speed $(BENCH_OPTIONS)
	$(BIN)/python -m bench.plots

test: lint .venv/emulator.stamp
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: .venv/test.stamp .venv/emulator.stamp
	$(BIN)/pytest -n 2 -m slow

lint: .venv/test.stamp
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	@# The folders at the top are one package once installed; mypy is shown them that way, by links.
	@rm -rf build/typed/pumice && mkdir -p build/typed/pumice
	@ln -s $(CURDIR)/pumice/* $(addprefix $(CURDIR)/,$(FOLDERS)) build/typed/pumice/
	cd build/typed && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package pumice

format: .venv/test.stamp
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

.venv/bench.stamp: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[bench-models]' '$(TORCH)'
	@touch $@

# PyTorch is an extra of the product, and only the tests of its frontend need it.
.venv/test.stamp: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[dev]' '$(TORCH)'
	@touch $@

# ARM is emulated. Where these packages are missing and cannot be installed, those tests are skipped and say so.
EMULATOR := qemu-user-static libc6-arm64-cross
.venv/emulator.stamp: .venv/bin/python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(EMULATOR) >/dev/null 2>&1; then \
	    { apt-get -qq update && apt-get -qq install --no-install-recommends $(EMULATOR); } >/dev/null 2>&1 \
	        || echo "note: could not install $(EMULATOR): the tests for ARM will be skipped"; \
	fi
	@touch $@

clean:
	rm -rf .venv build out
