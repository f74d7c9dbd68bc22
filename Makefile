# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python
# EXTRAS=dev,interop, as in CI, brings PEFT and PyTorch too: the tests that open adapters there are skipped without them.
EXTRAS ?= dev
STAMP := $(VENV)/.installed-$(EXTRAS)

.PHONY: quickstart test faults lint format clean

quickstart: $(STAMP)  ## a small base model is trained, then fine-tuned with LoRA, on this machine and without a network
	$(RUN) recipes/quickstart.py

test: $(STAMP) lint  ## what CI runs
	$(RUN) -m pytest -n 2 --dist loadfile -q

faults: $(STAMP)  ## the long matrix of faults, as docs/reliability.md tells of it
	$(RUN) -m pytest tests/faults --faults -n 2 --dist loadfile -q

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# uv where it is installed, else venv and pip; exact versions come from constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	if command -v uv >/dev/null; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(RUN) --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && \
	  $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'; \
	fi
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
