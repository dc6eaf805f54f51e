# make demo | make study | make data | make test | make test-fast | make lint | make setup. Each sets up what it needs.

VENV := .venv
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
READY := $(VENV)/.ready
# gpu where there is one, else cpu; MACHINE=cpu forces it
MACHINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
TORCH := 2.13.0

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# uv installs into the environment that this names, and another one may be active.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Byte code is written even where the environment forbids it: importing vllm without it takes 11 s instead of 4.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo study data test test-fast lint setup clean

demo: $(READY)
	python -m mini.demo

# All methods, seeds and controls behind docs/study.md; goes on where it was killed. QUICK=1 is a rehearsal.
# make study MODEL=Qwen/Qwen2.5-Coder-1.5B-Instruct is the study of invented metrics (docs/prereg.md) on that model.
study: $(READY)
	python -m $(if $(MODEL),study.invented --model "$(MODEL)" --data-dir "$(DATA_DIR)",study.pocket) $(if $(QUICK),--quick)

# FinQA, from the download to the filtered CSVs, by the teacher that costs nothing: make data [DATA_DIR=D] [URL_BASE=URL]
# A killed or failed run goes on when it is started again. A CSV of programs that is there is kept: delete the filtered
# one to have it made again. (A generated CSV with a manifest is ours, so it is filtered until its filtered CSV has a
# manifest too, which is written last; until then the program teacher, whose failures the CSV keeps, writes it again.)
DATA_DIR ?= data
data: $(READY)
	@python -m preprocessing.download_finqa --data-dir "$(DATA_DIR)" $(if $(URL_BASE),--url-base "$(URL_BASE)")
	@python -m preprocessing.preprocess_finqa --data-dir "$(DATA_DIR)"
	@for split in train dev test; do \
		csv="$(DATA_DIR)/clean_with_code/FinQA/finqa_$${split}_generated"; \
		if [ -e "$${csv}_filtered.csv" ] && { [ -e "$${csv}_filtered.run.json" ] || [ ! -e "$$csv.run.json" ]; }; then \
			echo "$${csv}_filtered.csv: already there"; continue; \
		fi; \
		if [ ! -e "$$csv.csv" ] || grep -qs '"teacher": "program"' "$$csv.run.json"; then \
			python -m preprocessing.process_finqa_code_generation \
				--teacher program --split $$split --data-dir "$(DATA_DIR)" || exit 1; \
		fi; \
		python -m preprocessing.filter_valid_answers --split $$split --data-dir "$(DATA_DIR)" || exit 1; \
	done

# Two tests at a time, a thread each: most of the suite waits for one process or another.
WORKERS ?= 2
test: lint
	OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: lint
	python -m pytest -m "not slow"

lint: $(READY)
	ruff check .
	ruff format --check .
	basedpyright

setup: $(READY)

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml uv.lock requirements-cpu-excludes.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; name it with: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(MAKE) --no-print-directory install-$(MACHINE)
	@python -c "from transformers import Trainer; import torch, peft, nnsight" || \
		{ echo "error: the packages do not work together; start afresh with: make clean setup"; exit 1; }
	@touch $@

.PHONY: install-gpu install-cpu torch-cpu

install-gpu: locked-gpu
	pip install --constraint $(VENV)/locked.txt -e '.[gpu,dev]'

# The CPU build of torch first, and the packages that would break it left out. uv keeps a torch that it finds.
install-cpu: torch-cpu locked-cpu
	uv pip install --quiet --constraint $(VENV)/locked.txt --excludes requirements-cpu-excludes.txt -e '.[cpu,dev]'

# The versions of uv.lock. Constraints leave each installer its own index and the CPU build of torch; `uv sync` would not.
locked-%:
	pip install --quiet uv
	uv export --quiet --frozen --extra $* --extra dev --no-hashes --no-emit-project --output-file $(VENV)/locked.txt

torch-cpu:
ifeq ($(shell uname -s),Linux)
	@# From where pip looks as it is set up; PyPI itself has no CPU build, PyTorch's own index has.
	pip install --quiet --no-compile --no-deps torch==$(TORCH)+cpu 2>/dev/null || \
		pip install --quiet --no-compile --no-deps --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)+cpu
else
	pip install --quiet --no-compile torch==$(TORCH)
endif
