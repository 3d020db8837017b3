# Two commands: `make demo` and `make test`. Each makes .venv when it is missing or out of date; `make docs` .venv-docs.
PYTHON ?= python3
VENV   ?= .venv
DOCS   ?= .venv-docs
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-real docs zoo fuzz check format lock clean
demo: $(STAMP)
	$(BIN)/kdnas demo --out runs/demo

test: check
	$(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder -m "not zoo and not fuzz and not real"

# For who changes the conversion: many networks of timm, with random weights.
zoo: $(STAMP)
	$(BIN)/python -m pytest tests -n auto -m zoo

# Against the real libraries of the extras: models, data sets, trackers, targets. All sets are made in the tests.
test-real: $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev,real]' || $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,real]'
	$(BIN)/python -m pytest tests -n auto -m real

# The site of docs/ and of the pages that it links to, in site/; a link that leads nowhere is an error. No code is run, so
# that it needs no torch.
docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs build --strict

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# Random tables, stored files and command lines, with fixed seeds.
fuzz: $(STAMP)
	$(BIN)/python -m pytest tests -n auto -m fuzz

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/python .ci/words.py kdnas
	$(BIN)/python .ci/faces.py --check

format: $(STAMP)
	$(BIN)/python .ci/faces.py
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("kdnas needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Use: make demo PYTHON=python3.12")'
	@echo "Setting up $(VENV): about half a minute with a warm cache, some minutes with a slow network"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is missing: on Debian or Ubuntu run: sudo apt-get install -y python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || true
	@if [ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; then :; \
	 else echo "uv did not finish; pip takes over"; $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'; fi
	@touch $@

# For maintainers: a lock file of uv holds the registry's URLs, this file does not.
lock:
	$(BIN)/uv pip compile --quiet --universal --no-header --no-annotate --no-emit-index-url --extra dev --extra real pyproject.toml -o constraints.txt
	@! grep -n '://' constraints.txt

clean:
	rm -rf $(VENV) $(DOCS)
