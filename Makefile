# A fresh machine's two commands. Both make .venv, install into it what constraints.txt names, and run.
#   make demo            train a tiny model and show what it learned
#   make test            run the tests (make test ALL=1: the slow ones and those that need root too)
#   make demo PYTHON=python3.12 PIP_FLAGS="--extra-index-url https://..."

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
STAMP := $(VENV)/.installed
# Faster kernels, where an NVIDIA GPU is found.
GPU = $(shell bash worker/detect_gpus.sh --json 2>/dev/null | grep -q '"vendor": "NVIDIA"' && echo ,gpu)
ROOM_MB := 3000

.PHONY: demo test install fuzz
demo: install
	@$(VENV)/bin/invoke demo

test: install
	@$(VENV)/bin/invoke test $(if $(ALL),--all)

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or newer is needed: sudo apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $$($(PYTHON) --version) is too old, lanspeed needs 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make virtual environments: sudo apt install python3-venv"; exit 1; }
	@place=$(VENV); while [ ! -d "$$place" ]; do place=$$(dirname "$$place"); done; \
		test "$$(df -Pm "$$place" | awk 'NR == 2 {print $$4}')" -ge $(ROOM_MB) || \
		{ echo "make: $(VENV) needs $(ROOM_MB) MB here, more with CUDA; free some, or: make VENV=/elsewhere"; exit 1; }
	@$(PYTHON) master/make_environment.py $(VENV) --extras train,dpo,dev$(GPU) $(PIP_FLAGS)
	@touch $@

# Inputs that nobody would think of, for some minutes; other ones each time.
fuzz: install
	@FUZZ=$${FUZZ:-20000} $(VENV)/bin/python -m pytest -q tests/test_fuzz.py --timeout=3600
