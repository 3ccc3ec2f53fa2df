# Everything a checkout can do. Without make (Windows): the lines below, by hand.
PYTHON ?= python3
ifeq ($(OS),Windows_NT)
BIN := .venv/Scripts
else
BIN := .venv/bin
endif
BOOTSTRAP := @$(PYTHON) scripts/bootstrap.py

.PHONY: chat test check soak lint format types bench clean

chat: ## install what is needed and chat with SmolLM2-135M, quantized here
	$(BOOTSTRAP) run
	@$(BIN)/python scripts/default_model.py
	@$(BIN)/localr1 chat --temperature 0.2 --top-p 0.9 # As SmolLM2's makers advise.

test: ## install what is needed and run the tests
	$(BOOTSTRAP) test
	$(BIN)/python -m pytest

check: lint types test ## everything CI runs

soak: ## the long campaigns
	$(BOOTSTRAP) test
	$(BIN)/python -m pytest -m soak

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

bench: ## tokens a second of the model `make chat` opens
	$(BOOTSTRAP) run
	@$(BIN)/python scripts/default_model.py
	@$(BIN)/localr1 bench

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(name, ignore_errors=True) for name in ('.venv', 'build')]"
