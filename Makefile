# `make help` lists the verbs. All of them work on a machine that has Python 3.11, make and git.
.DEFAULT_GOAL := help
.PHONY: help setup repro test test-slow test-faults lint format exp sweep show dag plots report register promote remote-local remote-gdrive push pull predict bench drift-demo doctor verify lock sbom docker-build docker-shell docker-pull docker-train docker-test clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Stages are run as `python -m ...`: the virtual environment's python must be the first on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# GNU make 3.81, which macOS has, looks for simple commands on the PATH that it was called with, unless the shell is not its own.
SHELL := /bin/bash
# Stages inherit the environment, and must not see the key to the remote.
unexport GDRIVE_CREDENTIALS_DATA
remote-gdrive push pull doctor verify docker-pull docker-shell docker-train: export GDRIVE_CREDENTIALS_DATA := $(value GDRIVE_CREDENTIALS_DATA)
# What was installed last: a new requirements.txt installs again.
STAMP := $(VENV)/.installed

# Tests run in a process for each CPU, up to four; those of a file share one, with its fixtures.
PYTEST := env OMP_NUM_THREADS=1 python -m pytest -n logical --maxprocesses 4 --dist loadfile

# Columns that `make show` leaves out.
UNSHOWN := State|Executor|Created|^(metrics|models|data)/|^(step|epoch)$$|^(train\.loss|val|num)[._a-z0-9]*|^(onnx|largest|clean|false|detection|harmful|public|estimate|interval|decisions)[._a-z0-9]*

# For the docker verbs (docs/CONTAINER.md).
IMAGE_NAME ?= driftline
IMAGE_TAG ?= latest
HOST_DVC_CACHE_DIR ?=
HOST_SERVICE_ACCOUNT_KEY_PATH ?= $(wildcard .secrets/gdrive-key.json)
DOCKER_MEMORY_OPTS ?= --shm-size 1g
DOCKER_OPTS ?=
# Checkpoints and downloads are shared with runs outside. Paths are the same inside where dvc's configuration names them.
DOCKER_RUN = docker run --rm --user "$$(id -u):$$(id -g)" $(DOCKER_MEMORY_OPTS) $(DOCKER_OPTS) \
  --volume "$(CURDIR):/workspace" --volume "$(HOME)/.cache/driftline:/home/driftline/.cache/driftline" \
  $(if $(HOST_DVC_CACHE_DIR),--volume "$(HOST_DVC_CACHE_DIR):$(HOST_DVC_CACHE_DIR)" --env DVC_CACHE_DIR="$(HOST_DVC_CACHE_DIR)") \
  $(if $(HOST_SERVICE_ACCOUNT_KEY_PATH),--volume "$$(CDPATH= cd "$$(dirname "$(HOST_SERVICE_ACCOUNT_KEY_PATH)")" && pwd)/$$(basename "$(HOST_SERVICE_ACCOUNT_KEY_PATH)"):/run/secrets/gdrive-key.json:ro") \
  --env GDRIVE_CREDENTIALS_DATA --env WANDB_API_KEY --env WANDB_MODE --env CI_MODE
DOCKER_IMAGE = "$(IMAGE_NAME):$(IMAGE_TAG)"

help: ## list the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the pinned packages

$(STAMP): requirements.txt
	@test -n "$(PYTHON)" || { echo "make: no Python found: install Python 3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "make: $(PYTHON) is too old or too new: Python 3.10 to 3.13 is needed; say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	"$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	@touch $@

repro: setup ## run the pipeline (what is stale of it) and show the numbers
	dvc repro
	@echo
	@dvc metrics show metrics/evaluate.json metrics/export.json metrics/profile.json
	@echo
	@echo "Look at plots/evaluate/*.png, or run 'dvc plots show'. Next: dvc exp run -S train.lr=0.001"

test: setup ## run the tests, but not the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup ## run the slow tests: whole runs, and the real images where they are at hand
	$(PYTEST) -m "slow and not faults" $(ARGS)

test-faults: setup ## run the fault suite: kill, fill, starve and feed garbage (docs/RELIABILITY.md)
	python -m pytest -m faults tests/faults $(ARGS)

lint: setup ## check style, format and types
	ruff check .
	ruff format --check .
	mypy

format: setup ## mend style and format
	ruff check --fix .
	ruff format .

exp: setup ## run one experiment: make exp RECIPE=imagenette160 S="train.lr=0.02 train.epochs=4"
	python -m tools.exp $(if $(RECIPE),--recipe '$(RECIPE)') $(foreach setting,$(S),'$(setting)')

sweep: setup ## search settings: make sweep S="train.lr=tag(log,interval(0.001,0.1))" TRIALS=8 WORKERS=2
	python -m tools.sweep $(if $(RECIPE),--recipe '$(RECIPE)') $(if $(TRIALS),--trials $(TRIALS)) \
	  $(if $(WORKERS),--workers $(WORKERS)) $(foreach setting,$(S),'$(setting)')

show: setup ## compare the experiments: the main numbers, and the params that differ (dvc exp show has all)
	dvc exp show --only-changed --drop '$(UNSHOWN)' $(ARGS)

dag: setup ## draw the pipeline
	dvc dag

plots: setup ## draw all plots into one page
	dvc plots show

report: setup ## one page about a run: make report [REV=experiment] [AGAINST=revision]
	python -m tools.report $(REV) $(if $(AGAINST),--against '$(AGAINST)')

register: setup ## let the last commit be the next version of the model
	python -m tools.registry register

promote: setup ## put a version to work: make promote STAGE=prod [VERSION=v0.0.2]
	python -m tools.registry promote $(or $(STAGE),$(error say which stage: make promote STAGE=prod)) $(VERSION)

remote-local: setup ## use a folder as DVC's remote, no account needed: make remote-local [DIR=/path]
	python -m tools.remote setup-local $(if $(DIR),'$(DIR)')

remote-gdrive: setup ## use a Google Drive folder as DVC's remote: make remote-gdrive FOLDER=<its address>
	python -m tools.remote setup-gdrive '$(or $(FOLDER),$(error say which folder: make remote-gdrive FOLDER=<its address>))'

push: setup ## copy models to the remote
	python -m tools.remote push

pull: setup ## get models from the remote
	python -m tools.remote pull

predict: setup ## classify images: make predict IMAGES=/path/to/images [MODEL=prod]
	python -m tools.predict $(or $(IMAGES),$(error say which images: make predict IMAGES=/path/to/images)) \
	  $(if $(MODEL),--model '$(MODEL)')

bench: setup ## compare speed with hand-written loops: make bench DATA=/path/to/images.tgz
	python -m tools.benchmark $(if $(DATA),--data '$(DATA)')

drift-demo: setup ## let drift come, notice it, retrain, and look again, in a clone that is removed
	python -m tools.drift_demo

doctor: ## say what is wrong with this set-up, and what to type; works before `make setup`, too
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m tools.doctor; else "$(PYTHON)" -m tools.doctor; fi

verify: setup ## hash every output and DVC's cache: make verify [REPAIR=1]
	python -m tools.verify $(if $(REPAIR),--repair)

lock: setup ## resolve pyproject.toml into requirements.txt again (needs the package index)
	python -m pip install --quiet uv
	uv pip compile --quiet --universal --python-version 3.10 --group dev --no-header --generate-hashes \
	  --no-emit-package pyopenssl -o requirements.txt pyproject.toml

sbom: setup ## list every package of the lock in sbom.json (CycloneDX)
	cyclonedx-py requirements requirements.txt --pyproject pyproject.toml --output-reproducible --of JSON -o sbom.json

docker-build: ## build the image: make docker-build [ARGS="--build-arg TORCH_INDEX=..."]
	docker build $(ARGS) --tag $(DOCKER_IMAGE) .

docker-shell: docker-folders ## a shell in the container, on this repository
	$(DOCKER_RUN) --interactive --tty $(DOCKER_IMAGE) bash

docker-pull: docker-folders ## get models from the remote in the container
	$(DOCKER_RUN) $(DOCKER_IMAGE) python -m tools.remote pull $(ARGS)

docker-train: docker-folders ## run the pipeline in the container, or an experiment: make docker-train [ARGS="-S train.lr=0.001"]
	$(DOCKER_RUN) $(DOCKER_IMAGE) $(if $(ARGS),dvc exp run $(ARGS),dvc repro)

docker-test: docker-folders ## run the tests in the container: make docker-test [ARGS=tests/test_pipeline.py]
	$(DOCKER_RUN) $(DOCKER_IMAGE) $(PYTEST) -m "not slow" $(ARGS)

# What docker would make as root.
docker-folders:
	@mkdir -p "$(HOME)/.cache/driftline" $(if $(HOST_DVC_CACHE_DIR),"$(HOST_DVC_CACHE_DIR)")
	@test -z "$(HOST_SERVICE_ACCOUNT_KEY_PATH)" -o -f "$(HOST_SERVICE_ACCOUNT_KEY_PATH)" \
	  || { echo "make: HOST_SERVICE_ACCOUNT_KEY_PATH: $(HOST_SERVICE_ACCOUNT_KEY_PATH) is no file" >&2; exit 2; }

clean: ## remove the virtual environment and everything that the pipeline made (not DVC's cache)
	rm -rf $(VENV) data/raw data/processed data/profile models/classifier models/onnx models/drift data/.*.new data/.*.old models/.*.new models/.*.old dvc_plots benchmarks report metrics/profile.json metrics/export_speed.json .hypothesis .pytest_cache .mypy_cache .ruff_cache
	@rmdir data models 2> /dev/null || true # what else is in them is not the pipeline's
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
