# make demo    build .venv if needed, then run the worked example and write its report
# make test    build .venv if needed, then run the tests
# make check   formatting, lint, types
# make bench   the benchmarks (ARGS="..." is passed on)
# make bench-peers   build .venv-peers: other libraries, for benchmarks/peers
# make venv    only build .venv;   make clean: remove caches;   make distclean: remove .venv and .venv-peers too
#
# PYTHON=...           the interpreter to build .venv with (3.11 or newer)
# TORCH_INDEX_URL=...  the package index to take torch, and torch alone, from
# WORKERS=...          test processes (default 2)

VENV  := .venv
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# The stamp is named after what was installed and where, so that a changed file or a moved folder installs anew.
STAMP := $(VENV)/.stamp-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | tr ' ' '-')
WORKERS ?= 2
# One thread per process: results repeat bit for bit, and the workers do not fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test check bench bench-peers venv clean distclean

demo: $(STAMP)
	HF_HUB_OFFLINE=1 $(VENV)/bin/rootward demo $(ARGS)

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

# ARGS="collect --json" runs one of them; without ARGS all, and the exit code is 3 if a bar of any does not hold.
# Where .venv-peers is not built, the peers' figures are left out.
BENCHMARKS := startup collect convex ekfac_speed ekfac_scaling digits_lds lm_lds real_text demo
bench: $(STAMP)
	@export HF_HUB_OFFLINE=1; \
	if [ -n "$(ARGS)" ]; then $(PY) benchmarks/run.py $(ARGS); exit $$?; fi; \
	code=0; for name in $(BENCHMARKS); do $(PY) benchmarks/run.py $$name || code=$$?; done; exit $$code

# torch first, as for .venv, so that no peer brings another one; torchvision and torchaudio, which peers ask for and do
# not use, would break transformers beside a CPU build of torch. LogIX declares Python < 3.11 and runs on newer ones.
PEERS    := .venv-peers
PEER_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check
bench-peers: $(PEERS)/.stamp

$(PEERS)/.stamp: benchmarks/peers/requirements.txt constraints.txt | $(STAMP)
	$(PY) -m venv --clear $(PEERS)
	@set -e; \
	if [ -n "$${TORCH_INDEX_URL:-}" ]; then \
	  $(PEER_PIP) install -q --no-deps --index-url "$$TORCH_INDEX_URL" "$(TORCH)"; \
	else \
	  $(PEER_PIP) install -q -c constraints.txt "$(TORCH)"; \
	fi
	grep -v '^logix-ai==' benchmarks/peers/requirements.txt | $(PEER_PIP) install -q -c constraints.txt -r /dev/stdin
	$(PEER_PIP) install -q --no-deps --ignore-requires-python $$(grep '^logix-ai==' benchmarks/peers/requirements.txt)
	$(PEER_PIP) uninstall -q -y torchvision torchaudio
	@$(PEERS)/bin/python -c 'import kronfluence, bergson, dattri, logix'
	@touch $@

venv: $(STAMP)

$(STAMP):
	@set -e; \
	if ! $(PY) -c '' >/dev/null 2>&1; then \
	  found=; \
	  for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      found=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "Expected Python 3.11 or newer, found none; pass PYTHON=/path/to/it." >&2; exit 1; fi; \
	  echo "Building $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade
	@set -e; \
	have=$$($(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' 2>/dev/null || true); \
	if [ "$$have" != "$(TORCH)" ]; then \
	  echo "Downloading $(TORCH): on an ordinary Linux machine this is a CUDA build of several GB (TORCH_INDEX_URL chooses another index)."; \
	  if [ -n "$${TORCH_INDEX_URL:-}" ]; then \
	    $(PIP) install --no-deps --index-url "$$TORCH_INDEX_URL" "$(TORCH)"; \
	  else \
	    $(PIP) install -c constraints.txt "$(TORCH)"; \
	  fi; \
	fi
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@set -e; \
	if $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torchvision") is None)' \
	   && ! $(PY) -c 'import torchvision' >/dev/null 2>&1; then \
	  echo "Removing a torchvision that does not fit $(TORCH): transformers would import it and fail. Nothing here needs it."; \
	  $(PIP) uninstall -y -q torchvision; \
	fi
	@$(PY) -c 'import torch, transformers, peft'
	@rm -f $(VENV)/.stamp-*
	@touch $@

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .cache
	find . \( -path ./$(VENV) -o -path ./$(PEERS) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS)
