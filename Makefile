# The two commands of the README. Each makes its own virtual environment the first time.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/demo.done
	$(BIN)/python summarization/compare.py --methods full keyformer --kv_cache 50 --n_obs 20 --bs 4 --show 2

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy summarization
	$(BIN)/mypy conversation
	$(BIN)/mypy paper
	$(BIN)/mypy lm_eval_harness
	$(BIN)/mypy benchmarks
	$(BIN)/python -m pytest -n auto --dist worksteal

clean:
	rm -rf $(VENV)

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@
