# `make` lists the targets. Variables: PYTHON (3.11 or newer), TORCH and TORCH_LOWEST (what pip is asked
# for), FUZZ (hostile updates that `make fuzz` tries; a tenth as many published folders).
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
TORCH ?= torch==2.13.0
TORCH_LOWEST ?= torch==2.13.0
FUZZ ?= 100000
BIN := .venv/bin
STAMP := .venv/.installed
LOWEST_STAMP := .venv-lowest/.installed
FLOWER_STAMP := .venv-flower/.installed
DP_STAMP := .venv-dp/.installed
AGENT_STAMP := .venv-agent/.installed
DEVICE_STAMP := .venv-device/.installed
# The tests of a file run in one process, which makes what they share once; the long files come first.
BY_FILE := --dist loadfile --no-loadscope-reorder
DOCS_STAMP := .venv/.docs
# Said explicitly, accelerate needs no config file and warns about no defaults.
# -q: an error of ours is one line; without it accelerate adds its own traceback.
LAUNCH := $(BIN)/accelerate launch -q --num_processes 1 --num_machines 1 \
	--mixed_precision no --dynamo_backend no

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lowest federation flower privacy agent agent-test device fuzz kills check lint format bench suite claims table docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## build .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "pfm_llm needs Python 3.11 or newer, and $(PYTHON) is not." >&2; \
		echo "Name one: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		echo "No .venv could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
		rm -rf .venv; exit 1; }
	# torch first: left to a range, pip may choose another build of several GB
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: install ## run the quickstart: a federated recommender in a few minutes on a CPU
	$(LAUNCH) scripts/fed_train.py

test: install ## run every test, on two cores
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 $(BY_FILE)

lowest: $(LOWEST_STAMP) ## run the unit tests with the lowest versions that are admitted
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-lowest/bin/python -m pytest -n 2 $(BY_FILE) tests/unit

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt "$(TORCH_LOWEST)"
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[test]"
	@touch $@

federation: $(FLOWER_STAMP) ## run a federation on Flower: TLS, three nodes on this machine, real users
	OMP_NUM_THREADS=1 .venv-flower/bin/python benchmarks/federation.py

flower: $(FLOWER_STAMP) ## run the tests that need Flower
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-flower/bin/python -m pytest -n 2 $(BY_FILE) \
		tests/integration/test_flower_faults.py tests/integration/test_flower.py tests/integration/test_canary_flower.py \
		tests/unit/flower tests/unit/test_layers.py tests/unit/test_imports.py

$(FLOWER_STAMP): pyproject.toml constraints-flower.txt
	test -x .venv-flower/bin/python || $(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -m pip install --quiet -c constraints-flower.txt "$(TORCH)"
	.venv-flower/bin/python -m pip install --quiet -c constraints-flower.txt -e ".[test,flower]"
	@touch $@

privacy: $(DP_STAMP) ## run the tests that need dp-accounting
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-dp/bin/python -m pytest -n 2 $(BY_FILE) \
		tests/unit/server tests/unit/federation tests/integration/test_privacy.py

$(DP_STAMP): pyproject.toml constraints-dp.txt
	test -x .venv-dp/bin/python || $(PYTHON) -m venv .venv-dp
	.venv-dp/bin/python -m pip install --quiet -c constraints-dp.txt "$(TORCH)"
	.venv-dp/bin/python -m pip install --quiet -c constraints-dp.txt -e ".[test,dp]"
	@touch $@

agent: $(AGENT_STAMP) ## open the page of a personal agent on the newest run
	.venv-agent/bin/pfm agent

agent-test: $(AGENT_STAMP) ## run the tests of the agent's page, in Chromium where it is installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-agent/bin/python -m pytest -n 2 $(BY_FILE) \
		tests/unit/agent tests/unit/test_layers.py tests/unit/test_imports.py tests/integration/test_agent_page.py tests/integration/test_host_command.py

$(AGENT_STAMP): pyproject.toml constraints-agent.txt
	test -x .venv-agent/bin/python || $(PYTHON) -m venv .venv-agent
	.venv-agent/bin/python -m pip install --quiet -c constraints-agent.txt "$(TORCH)"
	.venv-agent/bin/python -m pip install --quiet -c constraints-agent.txt -e ".[agent-test]"
	@touch $@

device: $(DEVICE_STAMP) ## run the tests that need llama.cpp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv-device/bin/python -m pytest -n 2 $(BY_FILE) \
		tests/integration/test_device.py tests/integration/test_staging_device.py \
		tests/unit/publish/test_gguf_lora.py tests/unit/publish/test_lora_folder.py

$(DEVICE_STAMP): pyproject.toml constraints-device.txt
	test -x .venv-device/bin/python || $(PYTHON) -m venv .venv-device
	.venv-device/bin/python -m pip install --quiet -c constraints-device.txt "$(TORCH)"
	.venv-device/bin/python -m pip install --quiet -c constraints-device.txt -e ".[test,device]"
	@touch $@

fuzz: install ## try 100,000 hostile updates and 10,000 folders; an hour. Results go to results/faults
	PFM_FUZZ=$(FUZZ) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/fuzz

kills: install ## kill a tiny run 100 times, and compare what its resumed ends hold
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.kills

check: lint ## lint, check types and run the unit tests
	$(BIN)/python -m pytest tests/unit

lint: install ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## race the stacked engine against one client at a time, and rounds of methods
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/rounds.py

suite: install ## compare methods on MovieLens-100K, small budget; goes on where it stopped
	$(LAUNCH) scripts/benchmark.py --suite configs/suites/ml100k.yaml --budget small

claims: install ## look up every figure that README and docs state, in the committed results
	$(BIN)/python -m scripts.update_claims

table: claims ## rebuild the tables of README and docs, and the reports, from the committed results
	$(BIN)/python -m scripts.update_readme

docs: install $(DOCS_STAMP) ## build the documentation into site/; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS_STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@

clean: ## remove tool caches and build output; .venv, runs and assets stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
