# Every target sets up what it needs in .venv, from the pins of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Architectures of the emulated GPU, and further options: --races, --sums=hardware.
ARCHS ?= sm_80 sm_90
EMULATED ?=
# In .venv: the folder of another Triton than the environment's own.
TRITON ?= .
WITH_TRITON := PYTHONPATH=.venv/$(TRITON) TRITON_CACHE_DIR=.venv/cache/$(TRITON)
KERNEL_TESTS := tests/test_resident.py tests/test_dual.py tests/test_packs.py tests/test_primal.py

.PHONY: help demo test test-all test-virtual-gpu test-compiles test-interpreted test-triton-versions lint docs peers bench bench-scale gpu clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /: /'

demo: .venv/demo ## meta-train the sine regression of the MAML paper and show what it learned
	$(BIN)/fomaml-fused train sine --out runs/sine

test: .venv/dev lint ## lint, types, and tests of every engine, kernel and public function; three minutes
	$(BIN)/python -m pytest -n 2 --dist=worksteal --quick

test-all: .venv/dev lint ## lint, types and all tests; a quarter of an hour
	$(BIN)/python -m pytest -n 2 --dist=worksteal

test-virtual-gpu: .venv/dev $(TRITON:triton-%=.venv/triton-%) ## compiled kernels on an emulated GPU; ARCHS=sm_90 EMULATED="--races --sums=hardware" TRITON=triton-3.6.0
	for arch in $(ARCHS); do $(WITH_TRITON) $(BIN)/python -m pytest -n 2 --dist=worksteal --kernels=$$arch $(EMULATED) \
		$(KERNEL_TESTS) tests/test_emulated_kernels.py tests/test_counted.py || exit; done

test-compiles: .venv/dev $(TRITON:triton-%=.venv/triton-%) ## every kernel that public calls launch compiles; TRITON=triton-3.6.0 or triton-newest
	$(WITH_TRITON) $(BIN)/python -m pytest -n 2 tests/test_launches_compile.py

test-triton-versions: ## kernel tests interpreted, compiled and emulated under the oldest, the pinned and the newest Triton
	for triton in triton-3.6.0 . triton-newest; do \
		$(MAKE) test-compiles test-virtual-gpu test-interpreted TRITON=$$triton || exit; done

test-interpreted: .venv/dev $(TRITON:triton-%=.venv/triton-%)
	$(WITH_TRITON) $(BIN)/python -m pytest -n 2 $(KERNEL_TESTS) tests/test_interpreter.py

lint: .venv/dev ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --num-workers 2

docs: .venv/docs ## render docs/ and the reference from docstrings to build/docs; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -E -q docs build/docs
	@echo build/docs/index.html

peers: .venv/peers ## install the libraries that `make bench` compares with: learn2learn, higher, TorchOpt, JAX

bench: .venv/dev ## time the workloads against those peers that are installed, about ten minutes, with all of them twenty; table, and a plot in build/bench
	$(BIN)/python -m pytest bench -p no:xdist -W default --benchmark-json=bench/results/latest.json; passed=$$?; \
		$(BIN)/python -m bench.report bench/results/latest.json --figures build/bench && exit $$passed

bench-scale: .venv/dev ## how time and memory grow over tasks, shots, width and steps, and where a step's time goes; about ten minutes
	$(BIN)/python -m bench.scale --save build/bench/scale.json --figures build/bench
	$(BIN)/python -m bench.profile_steps --save build/bench/profile.json

gpu: ## test and time the kernels on this machine's GPU, with its own Python and no installation; results go to OUT
	$(PYTHON) -m bench.gpu --out "$${OUT:-bench/results}"

clean: ## remove what the other targets made
	rm -rf .venv runs build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

.venv/demo .venv/dev .venv/docs: .venv/%: pyproject.toml setup.py constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[$*]'
	touch $@

.venv/peers: .venv/dev bench/peers.txt bench/install_peers.py
	$(BIN)/python -m bench.install_peers
	touch $@

# Triton alone, in front of the environment's own; NumPy with the oldest, whose interpreter newer ones break.
.venv/triton-3.6.0: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==3.6.0 'numpy<2.4'

.venv/triton-newest: .venv/dev
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ triton
