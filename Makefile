# make demo | serve | test | test-all | lint | bench | attack | faults | soak | help
SHELL := bash
.ONESHELL:
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

NP ?= 2
ARGS ?=
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
OPENAI_PORT ?= 9000
PORTS = --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) --openai-port $(OPENAI_PORT)

# Uses the active environment (conda's base does not count), or the .venv that install.sh made.
ENV = [ -n "$${VIRTUAL_ENV:-}" ] || [ "$${CONDA_DEFAULT_ENV:-base}" != base ] || source .venv/bin/activate
# --bind-to none: ranks divide the cores themselves. Open MPI starts as root only with --allow-run-as-root.
MPIRUN = mpirun --bind-to none --oversubscribe $$([ "$$(id -u)" = 0 ] && echo --allow-run-as-root)

# A worker for each core, up to 8; each takes whole files, in the order that tests/conftest.py gives them.
PYTEST = python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo serve test test-all lint bench attack faults soak

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install:  ## install what is missing (./install.sh; a second run takes seconds)
	@./install.sh

demo: install  ## serve the model in models/ on 2 ranks, ask it for two stories, stop
	@$(ENV)
	$(MPIRUN) -n 2 ./server.py --hf-model-name models/stories --tp 2 $(PORTS) &
	server=$$!
	stop() { kill -TERM $$(cat /proc/$$server/task/$$server/children) && wait $$server; }
	trap 'stop 2>/dev/null || true' EXIT
	./client.py --url http://localhost:$(HTTP_PORT) --model-name stories --init-timeout-s 120 \
	  --output-len 120 --top-k 40 --temperature 0.8 --random-seed 7 \
	  --prompts "Once upon a time there was a king who" "The children ran down to the river, and" &
	client=$$!
	wait -n $$server $$client || { echo "demo: the server or the client failed"; kill $$client 2>/dev/null || true; exit 1; }
	wait $$client
	trap - EXIT
	stop

serve: install  ## serve until stopped: make serve NP=4 ARGS="--hf-model-name gpt2 --tp 2 --pp 2"
	@$(ENV)
	exec $(MPIRUN) -n $(NP) ./server.py --hf-model-name models/stories --tp $(NP) $(PORTS) $(ARGS)

test:  ## ruff, then the tests that are not marked slow: about 7 minutes on 2 cores
	@./install.sh --dev
	$(ENV)
	ruff check . && ruff format --check .
	$(PYTEST) -m "not slow"

test-all:  ## lint, then all tests that this machine can run, those with Slurm, containers (for root), Chromium and lm-eval too
	@./install.sh --dev --slurm --clients --containers
	$(MAKE) lint
	$(ENV)
	$(PYTEST)

lint:  ## ruff, mypy, and shellcheck where it is installed
	@$(ENV)
	ruff check . && ruff format --check .
	mypy
	if command -v shellcheck >/dev/null; then shellcheck -e SC1091 install.sh .ci/run deploy/docker/*.sh deploy/kubernetes/*.sh deploy/slurm/*.sbatch; fi

bench: install  ## latency of the torch engine beside Hugging Face generate, GPT-2 124M shape
	@$(ENV)
	python benchmarks/latency.py --shapes 124M --batches 1 8 --compare hf

attack:  ## attacks on a server of its own, and what its other clients see: about 10 minutes (ARGS="--fuzz 500" for fewer requests)
	@./install.sh --dev
	$(ENV)
	python benchmarks/attack.py $(ARGS)

faults:  ## kills, stops and breaks each process of servers of its own: what becomes of them, about 4 minutes (ARGS="--only SIGSTOP")
	@./install.sh --dev
	$(ENV)
	python benchmarks/faults.py $(ARGS)

soak:  ## mixed load on a server of its own, and its processes' memory: 30 minutes (ARGS="--minutes 5 --settle-minutes 2")
	@./install.sh --dev
	$(ENV)
	python benchmarks/soak.py $(ARGS)
