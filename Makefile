# `make demo` and `make test` need python3 (>= 3.11) and nothing else; both set up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= auto

.PHONY: demo test extras lint types bench clean

demo: $(STAMP)
	$(BIN)/python examples/digits.py --demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The tests of tf.data, torch and Google storage are skipped without these (CPU builds in CI).
extras: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchdata tensorflow-cpu tensorboard gcsfs gcp-storage-emulator

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy resolves the package-dir mapping only against an installed wheel.
types: $(STAMP)
	$(BIN)/pip install --quiet --force-reinstall --no-deps --target $(VENV)/typed .
	MYPYPATH=$(VENV)/typed $(BIN)/mypy --cache-dir $(VENV)/mypy -p resilient_ckpt

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/storage.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
