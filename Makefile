# Each target makes the environment that it needs: Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
CUDA_VENV ?= .venv-cuda
NEWEST_VENV ?= .venv-newest
# Large pages for the arrays of each step: 10 to 15 % of a step's time on CPU (glibc 2.35 or newer; ignored elsewhere).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Two processes, each file in one of them, in the order of tests/conftest.py. More of them would take the cores from
# the tests that start pods.
IN_PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

# pip would compile file after file; compileall does it on all cores.
QUIETLY = --quiet --disable-pip-version-check --no-compile

define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "clip_jax needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install $(QUIETLY) --constraint constraints.txt --editable '$(2)'
	@$(1)/bin/python -m compileall -q -j 0 $(1)/lib >$(1)/compileall.log || true  # some packages have broken examples
	@touch $@
endef

.NOTPARALLEL:
.PHONY: quickstart test test-fast test-newest test-nightly test-mutation test-peers test-peers-nightly test-cuda lint format bench lock clean

quickstart: $(VENV)/.base  ## train a small CLIP on the pairs that ship, and report
	$(VENV)/bin/python -m clip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.test  ## every test but the slow ones and those that need the PyTorch peers
	$(VENV)/bin/python -m pytest $(IN_PARALLEL) -m "not slow" --ignore=tests/peers

test-nightly: $(VENV)/.test  ## the slow ones as well, with optimized programs
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(VENV)/bin/python -m pytest $(IN_PARALLEL) --ignore=tests/peers

test-mutation: $(VENV)/.test  ## which tests catch each of many planted faults; hours
	$(VENV)/bin/python tests/mutation

# The short unit tests of every subsystem: two minutes on two cores. With the newest versions of all libraries they show
# whether one of these breaks something.
FAST_TESTS = \
	tests/data/sources tests/data/test_crops.py tests/data/test_images.py tests/data/test_tokenizer.py \
	tests/evaluation/test_labels.py tests/evaluation/test_metrics.py tests/evaluation/test_registry.py \
	tests/evaluation/test_retrieval.py tests/evaluation/test_robustness.py tests/launch/test_gke_jobset.py \
	tests/losses tests/models/test_attention.py tests/models/test_clip.py tests/models/test_execution.py \
	tests/models/test_layers.py tests/test_lock.py tests/test_relative_paths.py tests/test_run_folder.py \
	tests/test_sharding.py tests/training/test_metrics.py tests/training/test_optimizer.py \
	tests/training/test_step.py::test_a_batch_seen_again_and_again_is_learnt_by_heart \
	tests/weights/test_mistakes.py tests/weights/test_reading.py tests/weights/test_round_trips.py

test-fast: $(VENV)/.test  ## the short unit tests of every subsystem, in two minutes
	$(VENV)/bin/python -m pytest $(IN_PARALLEL) -m "not slow" $(FAST_TESTS)

test-newest: $(NEWEST_VENV)/.test  ## the same with the newest versions of everything: make PYTHON=python3.13 test-newest
	$(NEWEST_VENV)/bin/python -m pytest $(IN_PARALLEL) -m "not slow" $(FAST_TESTS)

test-peers: $(PEERS_VENV)/.peers  ## compare with PyTorch's CLIPs, live
	$(PEERS_VENV)/bin/python -m pytest $(IN_PARALLEL) -m "not slow" tests/peers

test-peers-nightly: $(PEERS_VENV)/.peers  ## the largest models with every peer as well
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PEERS_VENV)/bin/python -m pytest tests/peers

test-cuda: $(CUDA_VENV)/.cuda  ## what XLA's compiler makes for GPUs; none is needed
	$(CUDA_VENV)/bin/python -m pytest tests/benchmarks/test_gpu_program.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(PEERS_VENV)/.peers  ## what benchmarks/README.md claims
	$(PEERS_VENV)/bin/python -m benchmarks.tokenizer
	$(PEERS_VENV)/bin/python -m benchmarks.cpu_gradients
	$(PEERS_VENV)/bin/python -m benchmarks.inference
	$(PEERS_VENV)/bin/python -m benchmarks.linear_probe
	$(PEERS_VENV)/bin/python -m benchmarks.loss
	$(PEERS_VENV)/bin/python -m benchmarks.predict
	$(PEERS_VENV)/bin/python -m benchmarks.train_step

$(VENV)/.base: setup.py constraints.txt
	$(call make_venv,$(VENV),.)

$(VENV)/.test: setup.py constraints.txt
	$(call make_venv,$(VENV),.[test])

# Without constraints.txt, and anew each time that setup.py changes.
$(NEWEST_VENV)/.test: setup.py
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install $(QUIETLY) --editable '.[test]'
	@$(NEWEST_VENV)/bin/python -m pip list 2>/dev/null | grep -E '^(jax|flax|optax|orbax-checkpoint|grain|numpy) '
	@touch $@

$(VENV)/.dev: setup.py constraints.txt
	$(call make_venv,$(VENV),.[dev$(,)test])
	@touch $(VENV)/.base $(VENV)/.test

$(CUDA_VENV)/.cuda: setup.py constraints.txt
	$(call make_venv,$(CUDA_VENV),.[cuda$(,)test])

# What the tests need is copied, and what they import of the peers, a tenth, is compiled as they import it.
$(PEERS_VENV)/.peers: $(VENV)/.test
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	cp -Rp $(VENV)/lib/. $(PEERS_VENV)/lib/
	$(PEERS_VENV)/bin/python -m pip install $(QUIETLY) --constraint constraints.txt --editable '.[peers,test]'
	@touch $@

# After changing setup.py: resolves the newest versions anew and writes them down. By the oldest Python that is
# supported, since newer ones may get versions that it cannot install. On Linux with x86-64, the only system that has
# libtpu: docs/tpu.md and docs/pods.md state its version.
lock:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "lock with Python 3.11"; exit 2; }
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0
	.venv-lock/bin/python -m pip install --quiet '.[dev,test,peers,tpu]'
	.venv-lock/bin/python -m pip freeze --exclude clip-jax-tpu | sed 's/+cpu$$//' > constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf $(VENV) $(PEERS_VENV) $(CUDA_VENV) $(NEWEST_VENV) build *.egg-info

, := ,
