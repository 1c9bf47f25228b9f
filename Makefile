# Torch Relay: raw text → a served model, in five stages. `make` alone prints this help.

.NOTPARALLEL:
PYTHON  ?= python3
CLUSTER ?= local
OPTIONS := RUN MODEL RECIPE CLUSTER NODES GPUS FROM DATA ARGS STAGE DRY_RUN FORCE BIND PORT \
  API_KEY_FILE PROMPT RUNS VALIDATION COLUMNS RUNTIME IMAGE MOUNTS SERVICE DOWNTIME MODELS REPO \
  PUBLIC QUANTIZE DATA_ARGS PRETRAIN_ARGS FINETUNE_ARGS ALIGN_ARGS QUANTIZE_ARGS EVALUATE_ARGS \
  DEPLOY_ARGS PRETRAIN_RECIPE FINETUNE_RECIPE ALIGN_RECIPE EVALUATE_RECIPE DEPLOY_RECIPE
IMAGE_OPTIONS := ACCELERATOR BASE_IMAGE EFA TAG WHEELS TORCH_CPU OUT LINE
# As they were given: make would read a $ in them as its own variable, and run a $(shell …).
$(foreach name,$(OPTIONS) $(IMAGE_OPTIONS),$(eval override $(name) := $$(value $(name))))
export $(OPTIONS) $(IMAGE_OPTIONS)

LAUNCH := $(PYTHON) -m scripts.launch
VENV   := $(if $(or $(filter-out 0,$(DRY_RUN)),$(filter-out local,$(CLUSTER)),$(RUNTIME)),,\
  .venv/installed)
SMALL  := $(if $(VENV),.venv/quantize/installed)
# .venv holds what another ACCELERATOR needs.
OTHER  := $(if $(ACCELERATOR),$(if $(filter $(ACCELERATOR),$(file < .venv/installed)),,reinstall))
TEST   := .venv/bin/python -m pytest -q
LAUNCHER := scripts/run scripts/clusters scripts/launcher

.DEFAULT_GOAL := help
.PHONY: help setup demo pipeline data pretrain finetune align evaluate deploy undeploy rollback \
  chat quantize nccl-check status logs lineage stop cancel clean compare models generate \
  download upload filters test test-all test-nightly test-slurm test-kubernetes lint lock golden \
  image squashfs sif image-push image-check sbom reinstall

# STEPS=50 would train with the default. Names with a _ may be a program's, as SBATCH_TIMELIMIT.
UNKNOWN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
UNKNOWN := $(strip $(foreach name,$(filter-out PYTHON LANES ROUNDS,$(UNKNOWN)),$(if $(findstring \
  _,$(name)),,$(name))))
$(if $(UNKNOWN),$(error $(UNKNOWN): no such variable; make help lists them, ARGS="…" passes on))

help: ## This help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables\n'
	@printf '  %-22s %s\n' \
	  'RUN=name' 'the run (default: the name of MODEL)' \
	  'MODEL=debug' 'whose settings are taken (configs/models); the weights are those of FROM' \
	  'RECIPE=lora' 'how it works (configs/<stage>, or a folder); pipeline: FINETUNE_RECIPE=…' \
	  'CLUSTER=local|slurm|k8s' 'where stages run; local: RUNTIME=docker|podman in IMAGE=' \
	  'NODES=1 GPUS=1' 'nodes, and processes on each' \
	  'RUNS=folder' 'where runs are (default: runs/ here); in every command of a run' \
	  'DATA=file|folder|id' 'your data (docs/data.md); default: the documentation inside this Python' \
  'VALIDATION= COLUMNS=' 'data: a share or a file to hold out; our=your names of columns' \
	  'FROM=dir' 'start from this Hugging Face directory' \
	  'ARGS="..."' 'arguments of the upstream tool; for pipeline: PRETRAIN_ARGS=… and so on' \
	  'BIND= PORT= FORCE=1' 'deploy: address, port, without a verdict; API_KEY_FILE=… SERVICE=…' \
	  'DRY_RUN=1' 'print what would run, to read or paste; touch nothing'

##@ The line
demo: $(VENV) ## All stages here, to a served answer: with the debug model, or a real MODEL=
	@$(if $(filter-out debug,$(MODEL)),.venv/bin/python -m scripts.demo,RUN=$${RUN:-demo} \
	  $(LAUNCH) pipeline)
pipeline: $(VENV) ## All stages of RUN in order, going on from the first that is not done
data: $(VENV) ## Corpus → tokenizer, training and held-out sets
pretrain: $(VENV) ## Text → model, with torchtitan
finetune: $(VENV) ## Model → instruction model, with torchtune
align: $(VENV) ## Preference optimisation (DPO, with torchtune), or by rewards (GRPO, TRL)
evaluate: $(VENV) ## Scores and the verdict that deploy asks for, with lm-eval
deploy: $(VENV) ## Serve the model with vLLM's OpenAI API, in the background
chat: ## Talk to the served model; PROMPT="…" asks once
undeploy: ## Stop serving
rollback: ## Serve again what SERVICE= had before, with CLUSTER=k8s
quantize: $(SMALL) ## RUN's model in 8 or 4 bits → run RUN-RECIPE; deploy QUANTIZE=int8 goes on
nccl-check: $(VENV) ## Speed and transport of the network between NODES × GPUS ranks; slow nodes
generate: .venv/installed ## Answers of RUN's model to each prompt in DATA= → OUT=, with vLLM
	@.venv/bin/python -m scripts.generate
download: .venv/installed ## MODEL= (or org/name) of the hub, or the data of RECIPE= → MODELS=
	@.venv/bin/python -m scripts.download
upload: .venv/installed ## The model of RUN, or of STAGE= of it → REPO=org/name; PUBLIC=1 FORCE=1
	@.venv/bin/python -m scripts.upload

##@ A run
status: ## What is done, running, failed
logs: ## The end of the newest log (STAGE=…)
lineage: ## From the served model back to the corpus, by digests
stop: ## Save and stop what is running; the same command goes on
cancel: ## End it at once, without saving
clean: ## Remove the run, or one STAGE= of it
compare: ## Scores of RUN=a,b side by side, with errors
models: ## The models that have a name (any other by FROM): size, licence, memory

evaluate deploy: $(if $(QUANTIZE),$(SMALL))
pipeline data pretrain finetune align quantize evaluate deploy undeploy rollback chat nccl-check \
  status logs lineage stop cancel clean compare models:
	@$(LAUNCH) $@

##@ The image (image/build.sh names its variables)
image: ## Build it, with docker or podman; ACCELERATOR=cuda|cpu EFA=none BASE_IMAGE= TAG= WHEELS=
	@bash image/build.sh
image-check: ## Say on one page what IMAGE= holds, from inside it
	@bash image/check.sh
image-push: ## Push IMAGE=registry/name:tag, and name its digest
	@bash image/push.sh
squashfs: ## Write IMAGE= as one file for pyxis and enroot
	@bash image/export.sh sqsh
sif: ## Write IMAGE= as one file for apptainer
	@bash image/export.sh sif

##@ Development
setup: .venv/installed ## Install .venv from the lock (stages on this machine do it by themselves)
.venv/installed: requirements/cpu.lock requirements/dev.lock requirements/install.sh $(OTHER)
	@PYTHON=$(PYTHON) sh requirements/install.sh
.venv/quantize/installed: requirements/quantize.lock .venv/installed
	@rm -rf $(@D) && .venv/bin/python -m uv pip install --quiet --no-deps --require-hashes \
	  --target $(@D) --requirement $< && touch $@
filters: .venv/filters ## Install datatrove, for the filters of a data recipe (docs/data.md)
.venv/filters: requirements/filters.lock .venv/installed
	@.venv/bin/python -m uv pip install --quiet --require-hashes --requirement $<
	@touch $@
test: .venv/installed ## The fast tests
	@$(TEST) -n 2 -m "not slow" tests
test-all: .venv/installed ## Every test, the whole line included, two at a time
	@$(TEST) -n 2 --durations=12 tests
test-nightly: .venv/installed ## What is too long for every commit: the longest kill matrix
	@NIGHTLY=1 $(TEST) -m nightly --durations=12 tests
test-slurm: .venv/installed ## The Slurm tests, on their own Slurm; RELAY_SLURM=site: on this one
	@$(TEST) --durations=12 tests/test_slurm_text.py tests/test_slurm.py
test-kubernetes: .venv/installed ## The Kubernetes tests (RELAY_KUBERNETES=site likewise)
	@built=$$([ "$$RELAY_KUBERNETES" = site ] || bash tests/support/kube/build.sh) && \
	  PATH="$$PATH:$$built/bin" $(TEST) --durations=12 tests/test_kubernetes*.py
lint: .venv/installed ## ruff, mypy, shellcheck, vermin, sbatch headers
	@.venv/bin/python -m ruff check . && .venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy
	@.venv/bin/shellcheck -x requirements/*.sh .ci/run image/*.sh slurm/*.sh slurm/*.sbatch \
	  tests/support/kube/*.sh
	@bash slurm/lint.sh
	@.venv/bin/vermin -q --no-tips --violations -t=3.9- scripts/launch.py $(LAUNCHER)
lock: # Resolve requirements/*.in anew into *.lock
	@sh requirements/lock.sh
sbom: .venv/installed # Write sbom.json (CycloneDX) and docs/licences.md from what is installed
	@.venv/bin/cyclonedx-py environment --output-reproducible --output-file sbom.json
	@.venv/bin/python requirements/licences.py
golden: # Write tests/golden/ anew from DRY_RUN=1
	@.venv/bin/python -m tests.support.goldens
