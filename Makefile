# make install   .venv with the package, its op library and everything the tests need
# make demo      the main job on a real model: plan, export, verify, generate, compare
# make test      everything, in two processes (WORKERS=N); kernels on the GPU where there is one, else in Triton's interpreter
# make test-samples  what takes minutes of the samples: load on the server, a replica that is killed, the demo
# make test-gpu  what needs a GPU, and the kernels' tests on it
# make lint      ruff and mypy
# make docs      the documentation, in build/site; links and anchors are checked, nothing is fetched
# make sanitize  the C++ core under AddressSanitizer and UndefinedBehaviorSanitizer
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Two thread pools that spin on the same cores collapse; see docs/results.md.
export OMP_WAIT_POLICY := passive
export HF_HUB_OFFLINE := 1

.PHONY: install demo test test-samples test-gpu lint docs sanitize clean
install: $(VENV)/.installed

SOURCES := pyproject.toml constraints.txt CMakeLists.txt cpu_runtime/CMakeLists.txt $(wildcard cmake/*.cmake cpu_runtime/src/*)
$(VENV)/.installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) -V) found, 3.11 or newer is needed; run make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing attnspan and what it needs into $(VENV): two minutes or so"
	@# --no-compile: Python compiles the few modules that are imported; pip would compile all of PyTorch, for half a minute.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python samples/demo.py demo

test: install
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not samples"

# One after the other: they measure.
test-samples: install
	$(BIN)/pytest -m samples
	$(BIN)/python samples/demo.py build/demo

test-gpu: install
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	  { echo "error: PyTorch sees no NVIDIA GPU; run make test-gpu where it does, or make test, which interprets the kernels"; exit 2; }
	$(BIN)/pytest -m gpu

# mypy does not follow the import hooks of an editable install: show it the packages under their installed names.
PACKAGES := planner runtime calibration export cpu_runtime plugins
lint: install
	$(BIN)/ruff check .
	@mkdir -p build/types/attnspan && touch build/types/attnspan/__init__.py
	@for p in $(PACKAGES); do ln -sfn ../../../$$p build/types/attnspan/$$p; done
	MYPYPATH=build/types:samples $(BIN)/mypy $(addprefix -p attnspan.,$(PACKAGES)) -p server
	MYPYPATH=build/types:samples:benchmarks $(BIN)/mypy export.py benchmarks samples/demo.py samples/edge

# The theme's authors announce a successor on every build otherwise.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

sanitize:
	cmake -S . -B build/sanitize -DATTNSPAN_ORT=OFF -DATTNSPAN_TESTS=ON -DATTNSPAN_SANITIZE=ON > /dev/null
	cmake --build build/sanitize --parallel 2 > build/sanitize/log 2>&1 || { cat build/sanitize/log; exit 1; }
	build/sanitize/cpu_runtime/attnspan_core_test

clean:
	rm -rf build $(VENV) demo
