# make demo        one epoch of CCA on real images, before and after, in three minutes on two CPU cores
# make test        lint and tests
# make test-slow   the tests that take minutes: kills at random moments, a real Slurm cluster
# make base        the base model that the demo fine-tunes
# All of them make .venv and install the locked requirements where they are missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
export PATH := $(abspath $(BIN)):$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow lint install base clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt setup.py $(wildcard csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

demo: install
	rm -rf $(RUN)
	deepspeed cca_ds/train.py --ds_config ds_configs/zero3.json --output $(RUN)
	$(BIN)/python -m cca_ds.export --run $(RUN) --output $(RUN)/policy.safetensors --layout safetensors
	$(BIN)/python benchmarks/digits/demo.py --run $(RUN)

# Two halves beside each other: runs of several ranks mostly wait for one another. Exit code 5 is "none selected".
test: install lint
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; \
	$(BIN)/python -m pytest tests/dist -m "not slow and not slurm" --durations=8 $(PYTEST_ARGS) > $$log 2>&1 & ranks=$$!; \
	$(BIN)/python -m pytest --ignore tests/dist -m "not slow and not slurm" --durations=8 $(PYTEST_ARGS); one=$$?; \
	wait $$ranks; two=$$?; cat $$log; \
	for code in $$one $$two; do test $$code = 0 || test $$code = 5 || exit 1; done

test-slow: install
	$(BIN)/python -m pytest -m "slow or slurm" --durations=12 $(PYTEST_ARGS)

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
