# One way in. `make demo` and `make test` set up what they need on a fresh machine, and nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench-demo clean

$(READY): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $(READY)

demo: $(READY)  ## one paper day, three sites, real training: about 3 minutes on 2 cores
	$(BIN)/python launch.py configs/demo.yaml fresh=true

test: $(READY)  ## laws and smoke, at most 5 minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)  ## adds everything with many processes, at most 30 minutes
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench-demo: $(READY)  ## the demo's numbers: time, memory, loss, emissions, stall, twice the same
	$(BIN)/python bench/demo.py

clean:
	rm -rf $(VENV) runs data
