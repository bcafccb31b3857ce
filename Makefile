# make demo        one epoch of CCA on real images with three seeds, before and after: two to four minutes on two CPU cores
# make test        lint and tests
# make test-slow   the tests that take minutes: kills at random moments, a real Slurm cluster
# make base        the base model that the demo fine-tunes
# All of them make .venv and install the locked requirements where they are missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
SHELL := bash
.SHELLFLAGS := -o pipefail -c
RUN ?= runs/demo
export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-slow-others test-slow-ranks lint install base clean

install: $(VENV)/installed

# Each step can be interrupted: the next make goes on with what pip has downloaded and the compiler has built.
$(VENV)/installed: requirements.txt setup.py $(wildcard csrc/*/*)
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { echo "install 1/3: virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "install 2/3: packages of requirements.txt, a few minutes. The largest is PyTorch: 0.2 GB to download as a CPU"
	@echo "             build, 3 GB (7 GB on disk) as PyPI's CUDA build, which pip takes unless a CPU build is installed."
	@started=$$(date +%s); $(PIP) -r requirements.txt | sed -un '/Downloading.* MB)/p' && \
	echo "             $$(( $$(date +%s) - started )) s"
	@echo "install 3/3: kernels in C++, and in CUDA where there is a toolkit: three to six minutes on two cores."
	@started=$$(date +%s); $(PIP) --quiet --no-build-isolation --no-deps -e . && \
	echo "             $$(( $$(date +%s) - started )) s" && $(BIN)/python -m cca_ds | sed -n 1p
	@touch $@

demo: install
	rm -rf $(RUN)
	for seed in 0 1 2; do \
	    deepspeed cca_ds/train.py --ds_config ds_configs/zero3.json --set seed=$$seed --output $(RUN)/seed$$seed && \
	    cca-export --run $(RUN)/seed$$seed --output $(RUN)/seed$$seed/policy.safetensors || exit 1; \
	done
	$(BIN)/python benchmarks/digits/demo.py $(RUN)/seed0 $(RUN)/seed1 $(RUN)/seed2

# On few cores, threads of one half of the tests that wait for one another would take them from the other.
pytest = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( $$(nproc) > 3 ? 2 : 1 ))} $(BIN)/python -m pytest --durations=8

# Tests in two halves beside each other, of which the first mostly waits (for ranks, for Slurm) and is printed last.
# Exit code 5 is "none selected".
define side_by_side
	log=$$(mktemp); trap 'rm -f $$log' EXIT; \
	$(pytest) $(1) $(PYTEST_ARGS) > $$log 2>&1 & first=$$!; \
	$(pytest) $(2) $(PYTEST_ARGS); two=$$?; \
	wait $$first; one=$$?; cat $$log; \
	for code in $$one $$two; do test $$code = 0 || test $$code = 5 || exit 1; done
endef

test: install lint
	@$(call side_by_side,tests/dist -m "not slow and not slurm",--ignore tests/dist -m "not slow and not slurm")

# In two, so that `make -j2 test test-slow` begins the second when `test` is through
test-slow: test-slow-others test-slow-ranks

test-slow-others: install
	@$(call side_by_side,-m "slurm",--ignore tests/dist -m "slow and not slurm")

test-slow-ranks: install
	@$(pytest) tests/dist -m "slow and not slurm" $(PYTEST_ARGS) || test $$? = 5

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Remakes the base model that the demo fine-tunes (about four minutes on two CPU cores).
base: install
	rm -rf runs/digits_pretrain
	deepspeed cca_ds/train.py --ds_config ds_configs/zero3.json --recipe digits_pretrain --output runs/digits_pretrain
	$(BIN)/python -m cca_ds.export --run runs/digits_pretrain --output cca_ds/assets/digits_base.safetensors --layout safetensors --dtype fp16

clean:
	rm -rf build runs .pytest_cache .ruff_cache
