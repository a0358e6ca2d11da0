## make setup        an environment in .venv for README and tutorials; compiles nothing
## make llama-cpp    and llama.cpp, built from source (two minutes): to run GGUF files here
## make demo         all paths on the embedded checkpoint: make, check, ask, measure, report
## make dev          the environment of `make setup`, and the tools of tests and documentation
## make check        lint, and the tests that matter most while you work: under two minutes
## make lint         ruff, mypy and the import contract
## make test         lint, documentation and tests
## make test-all     and the tests that take minutes each or gigabytes
## make test-pythons  install and run the core in the other Pythons that are here, a minute each
## make test-vllm    run the embedded checkpoint in vLLM on this CPU, in every format, half an hour
## make test-oracles  ask other libraries and engines about the formats for servers, each in an environment of its own
## make fuzz         fuzz the readers of untrusted files, about a minute each (SECONDS=60)
## make docs         build the documentation into build/docs; a warning, such as a dead link, is an error
## make docs-pages   make the generated pages and the README's table again
## make docs-picture  take the README's pictures of the report of `make demo`, in chromium
## make docs-shown   write what the blocks of README and tutorials print into them
## make results      measure the README's table of formats anew (docs/results.json)
## make bench        measure the tables of speed anew (docs/benchmarks.json), 30 minutes on idle cores
## make golden       record anew what llama.cpp's converter writes (tests/golden/gguf*.json, lora.json)
## make golden-kld   and what llama-perplexity measures (tests/golden/kld.json)
## make golden-served  and how those libraries decode the formats for servers (tests/golden/served.json)
## make golden-sentences  and what users read when something is wrong (tests/golden/sentences.txt)
## make clean        remove environments and everything that was built
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
PYTHONS := .venv-pythons
ORACLES := .venv-oracles
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
# one thread each; where a test asks for two, they sleep while they wait for each other: on busy
# processors, threads that spin take ten times as long
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
# llama-cpp-python is built from source (by `make llama-cpp`, and for the tests): without code for
# this very processor (its AMX kernels are miscompiled by common compilers), without the multimodal
# library, and without what only llama.cpp's own programs need: half of what there is to compile
WHEELS := $(VENV)/wheels
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF \
	-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/$(WHEELS)/library.cmake

.PHONY: help setup llama-cpp demo dev docs docs-pages docs-picture docs-shown results test test-all test-pythons test-vllm test-oracles golden golden-kld golden-served golden-sentences check lint fuzz bench clean

help:
	@sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST))

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by its exact version, so that pip takes a CPU build where one is at hand
$(VENV)/.setup: $(VENV)/.made pyproject.toml constraints.txt
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	@echo 'installing the other libraries, about a minute'
	@$(PIP) install --quiet --editable '.[nf4,eval,tune]'
	touch $@

# beside the libraries of `.setup`, where make may run two things at a time
$(WHEELS)/.made: $(VENV)/.made constraints.txt
	mkdir -p $(WHEELS)
	echo 'set(LLAMA_BUILD_COMMON OFF)' > $(WHEELS)/library.cmake  # its name and value: llama.cpp's
	@echo 'building llama.cpp, about two minutes on two cores'
	$(PIP) wheel --quiet --no-deps --wheel-dir $(WHEELS) "$$(grep '^llama_cpp_python==' constraints.txt)"
	touch $@

$(VENV)/.test: $(VENV)/.setup $(WHEELS)/.made
	$(PIP) install --quiet --find-links $(WHEELS) --editable '.[nf4,llama-cpp,eval,tune,test,docs]'
	$(PIP) install --quiet --no-deps axe-playwright-python  # for the axe-core in it alone
	touch $@

# llama.cpp's converter, from llama-cpp-python's source package: an oracle of the tests
LLAMA_CPP := $(VENV)/llama.cpp
SERVER := $(VENV)/llama-server
$(LLAMA_CPP)/.made: $(VENV)/.test
	rm -rf $(LLAMA_CPP) && mkdir -p $(LLAMA_CPP)
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest $(LLAMA_CPP) \
		"$$(grep '^llama_cpp_python==' constraints.txt)"
	tar -xzf $(LLAMA_CPP)/*.tar.gz -C $(LLAMA_CPP) --strip-components=3 \
		--wildcards '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*' \
		'*/vendor/llama.cpp/convert_lora_to_gguf.py'
	rm $(LLAMA_CPP)/*.tar.gz
	touch $@

setup: $(VENV)/.setup

llama-cpp: $(VENV)/.setup $(WHEELS)/.made
	@$(PIP) install --quiet --find-links $(WHEELS) --editable '.[llama-cpp]'

demo: setup
	$(BIN)/python demo/demo.py

dev: $(VENV)/.test

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every room, and the bytes of every format: NF4 beside bitsandbytes, FP8 beside PyTorch, GGUF beside
# llama.cpp. Plans of the largest sizes and whole tunings take seconds each: `make test` alone has them.
CHECKED := $(addprefix tests/test_, $(addsuffix .py, \
	names house one_core architecture api schemas \
	cli cli_verbs naming config roles sizes floats header inventory layers recipe manifest activations \
	plan_golden plan_digest plan_config plan_skip_list plan_files plan_steps plan_memory plan_shown \
	gguf_plan oracle_nf4 fp8_codec gguf_numbers order journal staging storage convert \
	pipeline_make tune verify_faults verify_files fp8_verify_lists evaluate_statistics \
	publish_documents)) \
	'tests/test_gguf_oracle.py::test_every_type_equals_llama_quantize[dense]'
UNCHECKED := not (35B or 122B or 397B or tuning or errors_alone or many_shards)

check: lint
	$(PYTEST) -n 2 -q -m 'not heavy' -k '$(UNCHECKED)' $(CHECKED)

docs: $(VENV)/.test
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --nitpicky -d build/doctrees docs build/docs

docs-pages: $(VENV)/.test
	$(BIN)/python docs/generate.py

docs-picture: demo
	$(BIN)/python docs/picture.py

docs-shown: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/pages.py README.md docs/tutorials/*.md docs/explanation/*.md

results: $(VENV)/.test
	$(BIN)/python -m benchmarks.formats
	$(BIN)/python docs/generate.py

# what both workers of pytest would compile at once; another process can do it beside lint and docs
.PHONY: kernels
kernels: $(VENV)/.test
	rm -rf build/kernels && mkdir -p build/kernels
	$(BIN)/qwen35 convert assets/qwen3.5-tiny build/kernels/fp8 --recipe fp8 --quiet > build/kernels/said
	$(BIN)/qwen35 gguf assets/qwen3.5-tiny build/kernels/gguf \
		--types Q2_K,Q3_K_M,Q4_K_M,Q6_K,IQ4_XS --quiet >> build/kernels/said

test: $(VENV)/.test lint docs kernels
	$(PYTEST) -n 2 -m 'not heavy'

test-all: $(VENV)/.test lint docs $(LLAMA_CPP)/.made $(SERVER)/.made \
		$(ORACLES)/llama-cpp-python-server/.made $(ORACLES)/lm-eval/.made
	QWEN35_LLAMA_CPP=$(CURDIR)/$(LLAMA_CPP) QWEN35_LLAMA_SERVER=$(CURDIR)/$(SERVER)/bin/llama-server \
		QWEN35_LLAMA_CPP_PYTHON_SERVER=$(CURDIR)/$(ORACLES)/llama-cpp-python-server/bin/python \
		$(PYTEST) -n 2
	PYTHONPATH=src $(ORACLES)/lm-eval/bin/python -m pytest -q tests/test_lm_eval.py

test-pythons: $(VENV)/.test
	$(BIN)/python tests/other_pythons.py $(PYTHONS)

golden: $(LLAMA_CPP)/.made
	PYTHONPATH=src:tests $(BIN)/python tests/golden_gguf.py $(CURDIR)/$(LLAMA_CPP)
	PYTHONPATH=src:tests $(BIN)/python tests/golden_lora.py $(CURDIR)/$(LLAMA_CPP)
	PYTHONPATH=src:tests $(BIN)/python tests/golden_config.py $(CURDIR)/$(LLAMA_CPP)

# llama.cpp's own programs from the same source: references of figures and of speed
PROGRAMS := $(VENV)/llama.cpp-programs
$(PROGRAMS)/.made: $(VENV)/.test
	rm -rf $(PROGRAMS) && mkdir -p $(PROGRAMS)
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest $(PROGRAMS) \
		"$$(grep '^llama_cpp_python==' constraints.txt)"
	tar -xzf $(PROGRAMS)/*.tar.gz -C $(PROGRAMS) --strip-components=1
	cmake -S $(PROGRAMS)/vendor/llama.cpp -B $(PROGRAMS)/build -DCMAKE_BUILD_TYPE=Release \
		-DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF
	cmake --build $(PROGRAMS)/build --target llama-perplexity --target llama-imatrix
	touch $@

# llama-server from the same source, without the prebuilt assets of its web page
$(SERVER)/.made: $(PROGRAMS)/.made
	cmake -S $(PROGRAMS)/vendor/llama.cpp -B $(SERVER) -DCMAKE_BUILD_TYPE=Release \
		-DGGML_NATIVE=OFF -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
		-DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(SERVER) --target llama-server
	touch $@

# llama-cpp-python's own server runs the build that is in $(VENV)
$(ORACLES)/llama-cpp-python-server/.made: tests/oracles/llama-cpp-python-server.txt $(VENV)/.test
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	touch $@

# lm-eval, with all else as in $(VENV)
$(ORACLES)/lm-eval/.made: tests/oracles/lm-eval.txt $(VENV)/.test
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

golden-kld: $(PROGRAMS)/.made
	PYTHONPATH=src:tests $(BIN)/python tests/golden_kld.py $(PROGRAMS)/build/bin/llama-perplexity

golden-sentences: $(VENV)/.test
	rm -f $(VENV)/sentences
	QWEN35_SENTENCES=$(CURDIR)/$(VENV)/sentences $(BIN)/pytest -q -m "sentences and not heavy"
	LC_ALL=C sort -u $(VENV)/sentences > tests/golden/sentences.txt

# vLLM pins its own transformers, so it has an environment of its own
$(VLLM)/.made: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	PIP_CONSTRAINT= $(VLLM)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PIP_CONSTRAINT= $(VLLM)/bin/python -m pip install --quiet -r tests/vllm/requirements.txt
	$(VLLM)/bin/python tests/vllm/mend.py
	touch $@

test-vllm: $(VENV)/.test $(VLLM)/.made
	mkdir -p build/vllm
	PYTHONPATH=tests $(BIN)/python tests/vllm/references.py build/vllm
	$(VLLM)/bin/python tests/vllm/compare.py build/vllm
	VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=src $(VLLM)/bin/python -m qwen35.cli.main \
		verify assets/qwen3.5-tiny --depth behaviour --engine vllm
	QWEN35_VLLM=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -q tests/test_real_servers.py -k vllm

# Libraries that decode what we write, and engines that run it: none is in the environment of the
# tests, and none shares one with another. Versions that constraints.txt has are its.
$(ORACLES)/%/.made: tests/oracles/%.txt constraints.txt
	$(PYTHON) -m venv $(@D)
	if grep -qx torch $<; then \
		$(@D)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"; fi
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

ASKED := build/oracles
.PHONY: ask-oracles
ask-oracles: export TQDM_DISABLE := 1
ask-oracles: $(VENV)/.test $(LLAMA_CPP)/.made $(ORACLES)/compressed-tensors/.made \
		$(ORACLES)/modelopt/.made $(ORACLES)/mlx/.made
	PYTHONPATH=src:tests $(BIN)/python tests/oracles/artifacts.py $(ASKED)
	PYTHONPATH=tests $(ORACLES)/compressed-tensors/bin/python tests/oracles/decode_compressed_tensors.py $(ASKED)
	PYTHONPATH=tests $(ORACLES)/modelopt/bin/python tests/oracles/decode_modelopt.py $(ASKED)
	PYTHONPATH=src:tests $(BIN)/python tests/oracles/decode_llama_cpp.py $(LLAMA_CPP) $(ASKED)
	PYTHONPATH=tests $(ORACLES)/compressed-tensors/bin/python tests/oracles/logits_transformers.py $(ASKED)
	PYTHONPATH=tests $(ORACLES)/mlx/bin/python tests/oracles/decode_mlx.py $(ASKED)
	PYTHONPATH=tests $(ORACLES)/mlx/bin/python tests/oracles/logits_mlx.py $(ASKED)

test-oracles: ask-oracles
	PYTHONPATH=src:tests $(BIN)/python tests/oracles/golden.py $(ASKED)

golden-served: ask-oracles
	PYTHONPATH=src:tests $(BIN)/python tests/oracles/golden.py $(ASKED) --write

SECONDS ?= 60
fuzz: $(VENV)/.test
	$(PIP) install --quiet --editable '.[fuzz]'
	mkdir -p build/fuzz
	set -e; for target in header json_header index gguf imatrix recipe; do \
		(cd build/fuzz && $(CURDIR)/$(BIN)/python $(CURDIR)/fuzz/fuzz.py $$target -max_total_time=$(SECONDS) \
			-verbosity=0); \
	done
	QWEN35_EXAMPLES=$$(( $(SECONDS) * 5 )) $(PYTEST) -n 2 -q tests/test_structures.py

# interrupted, it goes on with the next benchmark when run again
bench: $(VENV)/.test $(PROGRAMS)/.made
	$(BIN)/python -m benchmarks
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(VLLM) $(ORACLES) $(PYTHONS) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
