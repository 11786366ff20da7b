# make demo   the main job on the bundled text and models, on a CPU
# make test   all tests that need no GPU        make gpu    those that need one
# make check  format, lint, types               make bench  kernel benchmarks (needs a GPU)

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test gpu check bench clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/distill demo

# One thread a process: two workers with two threads each would wait for one another on two cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -q -m gpu tests/gpu

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels

# The constraints hold every version that was tested. torch 2.13.0 in them is a CPU build where pip is set
# up to offer one; on a GPU machine install the torch for its driver first, then `pip install .`
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON): Python 3.11 or newer is needed, found " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build demo *.egg-info
