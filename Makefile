# `make demo` and `make test` set up .venv by themselves; they need make and Python 3.11 or newer, nothing else.
#
# PYTHON3    the Python that .venv is made with:  make test PYTHON3=python3.12
# PIP_FLAGS  goes to pip install. On Linux x86-64 pip takes the CUDA build of torch unless told otherwise, several GB;
#            the CPU build (0.2 GB) is enough for all but `make test-gpu`. PyTorch's installation page gives the pip
#            option that selects it.
# ARGS       goes to pytest:  make test ARGS='-k reference -x'
# JOBS       how many processes `make test` takes, of one thread each; one for each core unless told otherwise.
# DATA, WORK of results-cifar10: the folder that holds cifar-10-batches-py, and one for runs and checkpoints. It wants
#            a CUDA GPU, and goes on where the piece before it stopped.

PYTHON3 ?= python3
PIP_FLAGS ?=
ARGS ?=
JOBS ?= auto
DATA ?= data
WORK ?= work

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(PYTHON) -m pip install --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DEVICE := $(VENV)/.installed-device

.PHONY: help
help: ## Say what each target does
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/\1|\2/p' Makefile | while IFS='|' read -r name text; \
	do printf 'make %-15s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(INSTALLED) ## Train, quantize, distil, export, verify and bench on handwritten digits: see demo/report.html
	$(PYTHON) -m faqd.demo --out demo

.PHONY: test
test: $(INSTALLED) ## Run the tests; those for a GPU are skipped where there is none
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PYTHON) -m pytest -rs --numprocesses $(JOBS) --dist worksteal $(ARGS)

.PHONY: test-gpu
test-gpu: $(DEVICE) ## Run the tests that need an NVIDIA GPU; without one they fail
	FAQD_REQUIRE=gpu $(PYTHON) -m pytest -rs -m gpu $(ARGS)

.PHONY: test-cpus
test-cpus: wheel ## Hold onnxruntime on emulated x86 and ARM CPUs against the reference; needs Debian on x86-64
	.ci/test_cpus $(PYTHON) dist/*.whl build/cpus

.PHONY: results-cifar10
results-cifar10: $(INSTALLED) ## Train CIFAR-10 at full length, a piece of nine minutes; again until it says written
	$(PYTHON) -m faqd.benchmarks.studies.cifar10 --data-root $(DATA) --work $(WORK) $(ARGS)

.PHONY: check
check: $(INSTALLED) ## Format, lint, types, import contracts
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

.PHONY: wheel
wheel: $(INSTALLED) ## Build the source archive, and from it the wheel, into dist/
	rm -rf dist
	$(PYTHON) -m build --quiet

.PHONY: clean
clean: ## Remove .venv, the demo and everything else that can be made again
	rm -rf $(VENV) demo dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find faqd tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(PYTHON):
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "$(PYTHON3) is missing or older than 3.11: install Python 3.11 or newer and name it, as in" \
	"'make PYTHON3=python3.12 $(or $(MAKECMDGOALS),test)'." >&2; exit 1; }
	$(PYTHON3) -m venv $(VENV)

# pip may be missing from a .venv that something else made, or that was interrupted.
$(INSTALLED): setup.cfg constraints.txt | $(PYTHON)
	@$(PYTHON) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m ensurepip --upgrade > /dev/null
	@echo "Installing into $(VENV): about 500 MB of packages, 1.9 GB on disk, with the CPU build of torch."
	@case "$$(uname -s) $$(uname -m)" in "Linux x86_64") \
	echo "Where pip takes the CUDA build of torch instead, it is several GB: PIP_FLAGS in the Makefile says how to choose.";; esac
	$(PIP_INSTALL) --editable '.[train,parquet,onnx,rtx,device,nvml,dev]'
	@touch $@

$(DEVICE): $(INSTALLED)
	@.ci/build_pycuda $(PYTHON) build/pycuda || { [ $$? = 3 ] && echo "Tests of pycuda are skipped."; }
	@touch $@
