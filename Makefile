# Everything you can do here. `make` lists it.
#
#   make train ARGS="--max_steps=500"    ARGS goes to the script, or to pytest
#   make train TRAIN_DIR=/data/run1      another folder; `make eval` and `make tensorboard` need it, too
#   make test TF=2                       TensorFlow 2.x; TF=1 is 1.15; without TF=, make chooses

DATA_DIR   ?= /tmp/cifar10_data
TRAIN_DIR  ?= /tmp/cifar10_train
EVAL_DIR   ?= /tmp/cifar10_eval
EXPORT_DIR ?= /tmp/cifar10_export
RECORD_DIR ?= /tmp/cifar10_record
WORKERS    ?= 1
EXERCISES  = $(filter-out __init__,$(basename $(notdir $(wildcard exercises/*.py))))

# tools/environment.py finds or builds the right environment; any Python from 3.6 on can run it.
# `exec`, so that a signal sent to the shell of a recipe reaches the script.
ENVIRONMENT = exec $(shell command -v python3 || uv python find) tools/environment.py --tensorflow='$(TF)'
RUN = @$(ENVIRONMENT) --

# $(value), so that spaces, quotes and $ reach the script.
quote  = '$(subst ','\'',$(value $(1)))'
DATA   = --data_dir=$(call quote,DATA_DIR)
TRAIN  = --train_dir=$(call quote,TRAIN_DIR)
SCRIPT_ARGS = $(value ARGS)
# Only if the user set it:
OWN_DATA    = $(if $(filter-out file,$(origin DATA_DIR)),$(DATA))

help: ## this list
	@echo 'Usage: make TARGET [TF=1|2] [ARGS="--flag=value ..."] [DATA_DIR=...] [TRAIN_DIR=...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'

train: ## train on one device, or resume the run in TRAIN_DIR
	$(RUN) cifar10_train.py $(DATA) $(TRAIN) $(SCRIPT_ARGS)
eval: ## evaluate the newest checkpoint in TRAIN_DIR, and each new one
	$(RUN) cifar10_eval.py $(DATA) --checkpoint_dir=$(call quote,TRAIN_DIR) --eval_dir=$(call quote,EVAL_DIR) $(SCRIPT_ARGS)
tensorboard: ## show training and evaluation in the browser
	$(RUN) -W ignore -m tensorboard.main --host localhost --logdir=$(call quote,TRAIN_DIR) $(SCRIPT_ARGS)
predict: ## classify your own pictures: ARGS="cat.jpg dog.png"
	$(RUN) cifar10_predict.py $(SCRIPT_ARGS)
eval-pretrained: ## evaluate the published model in results/
	$(RUN) cifar10_eval.py $(DATA) --checkpoint_dir=results --run_once $(SCRIPT_ARGS)
exercise: ## check your solution of an exercise: NAME=softmax
solution: ## run the same check on our solution: NAME=softmax
exercise solution:
	$(if $(filter $(NAME),$(EXERCISES)),,$(error NAME=$(NAME) is no exercise. Choose one of: $(EXERCISES)))
	@$(ENVIRONMENT) --with=exercises -- -m exercises.$(NAME) $(if $(filter solution,$@),--solution) $(OWN_DATA) $(SCRIPT_ARGS)

multi-gpu: ## train on several GPUs: ARGS="--num_gpus=2"
	$(RUN) cifar10_multi_gpu_train.py $(DATA) $(TRAIN) $(SCRIPT_ARGS)
cluster: ## train on several machines, simulated on this one: WORKERS=2
	$(RUN) -m support.local_cluster --workers=$(WORKERS) cifar10_distributed_train.py $(DATA) $(TRAIN) $(SCRIPT_ARGS)
convert: ## make a data set of your own pictures: DATA_DIR=/data/mine ARGS=/my/pictures
	$(if $(OWN_DATA),,$(error DATA_DIR= is missing. For example: make convert DATA_DIR=/data/mine ARGS=/my/pictures))
	$(RUN) cifar10_convert.py $(DATA) $(SCRIPT_ARGS)
export: ## export a trained model as a SavedModel
	$(RUN) cifar10_export.py --export_dir=$(call quote,EXPORT_DIR) $(SCRIPT_ARGS)
record: ## tables, plots and a small checkpoint of the run in TRAIN_DIR, in RECORD_DIR
	@$(ENVIRONMENT) --with=pictures -- results/record.py $(DATA) $(TRAIN) --record_dir=$(call quote,RECORD_DIR) $(SCRIPT_ARGS)
	@$(ENVIRONMENT) --with=pictures -- results/pictures.py $(DATA) --record_dir=$(call quote,RECORD_DIR) $(SCRIPT_ARGS)

env: ## only build the environment
	@$(ENVIRONMENT)
data: ## only download CIFAR-10
	$(RUN) -c 'import cifar10; from support import script; script.run(lambda argv: cifar10.maybe_download_and_extract())' $(DATA) $(SCRIPT_ARGS)
	@echo 'The data set in '$(call quote,DATA_DIR)' is complete.'

gpu-check: ## train and evaluate briefly on a GPU and print one row of a table
	$(RUN) tools/gpu_check.py $(DATA) $(SCRIPT_ARGS)
test: ## run the tests; they need no data set
	@$(ENVIRONMENT) --with=tests -- -m pytest -rs --disable-warnings cifar10_test.py tests $(SCRIPT_ARGS)
lint: ## check the style of the code; ARGS=--fix fixes it
	@$(ENVIRONMENT) --with=tests -- -m ruff check $(SCRIPT_ARGS)
	@$(ENVIRONMENT) --with=tests -- -m ruff format $(if $(ARGS),,--check)
soak: ## kills, malformed input, a served model, endurance: 2.5 hours; some minutes with ARGS=--quick
	@$(ENVIRONMENT) --with=tests -- tests/soak/fuzz.py $(filter --quick,$(ARGS))
	@$(ENVIRONMENT) --with=tests -- tests/soak/served.py $(DATA) $(SCRIPT_ARGS)
	@$(ENVIRONMENT) --with=tests -- tests/soak/kills.py $(DATA) $(SCRIPT_ARGS)
	@$(ENVIRONMENT) --with=tests -- tests/soak/cluster_kills.py $(DATA) $(SCRIPT_ARGS)
	@$(ENVIRONMENT) --with=tests -- tests/soak/endurance.py $(DATA) $(SCRIPT_ARGS)
bench: ## measure speed, also of PyTorch
	@$(ENVIRONMENT) --torch
	$(RUN) benchmarks/run.py $(DATA) $(SCRIPT_ARGS)

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*##.*/\1/p' Makefile)
