# Everything you can do here. `make` lists it.
#
#   make train ARGS="--max_steps=500"    ARGS goes to the script, or to pytest
#   make train TRAIN_DIR=/data/run1      another folder; `make eval` and `make tensorboard` need it, too
#   make test TF=2                       TensorFlow 2.x; TF=1 is 1.15; without TF=, make chooses

# The folders' defaults are those of the scripts. tools/environment.py finds or builds the Python
# environment; any Python from 3.6 on can run it. With `exec`, a signal sent to the shell of a recipe
# reaches the script.
ENVIRONMENT = exec $(shell command -v python3 || uv python find) tools/environment.py --tensorflow='$(TF)'
RUN         = @$(ENVIRONMENT) --

# --FLAG=FOLDER if the user set the folder. $(value), so that spaces, quotes and $ reach the script.
folder  = $(if $(value $(2)),--$(1)='$(subst ','\'',$(value $(2)))')
DATA    = $(call folder,data_dir,DATA_DIR)
TRAIN   = $(call folder,train_dir,TRAIN_DIR)
EVAL    = $(call folder,eval_dir,EVAL_DIR)
FLAGS   = $(value ARGS)

WORKERS   = 1
modules   = $(filter-out __init__,$(basename $(notdir $(wildcard $(1)/*.py))))
EXERCISES = $(call modules,exercises/solutions)

help: ## this list
	@echo 'Usage: make TARGET [TF=1|2] [ARGS="--flag=value ..."] [TRAIN_DIR=...]'
	@echo 'Folders: DATA_DIR, TRAIN_DIR, EVAL_DIR, EXPORT_DIR, RECORD_DIR. The flags of a script: ARGS=--help'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'

train: ## train on one device, or resume the run in TRAIN_DIR
	$(RUN) cifar10_train.py $(DATA) $(TRAIN) $(FLAGS)
eval: ## evaluate the newest checkpoint in TRAIN_DIR, and each new one
	$(RUN) cifar10_eval.py $(DATA) $(call folder,checkpoint_dir,TRAIN_DIR) $(EVAL) $(FLAGS)
tensorboard: ## show training and evaluation in the browser
	$(RUN) -m tools.open_tensorboard $(TRAIN) $(EVAL) -- $(FLAGS)
predict: ## classify your own pictures: ARGS="cat.jpg dog.png"
	$(RUN) cifar10_predict.py $(FLAGS)
eval-pretrained: ## evaluate the published model in results/
	$(RUN) cifar10_eval.py $(DATA) --checkpoint_dir=results --run_once $(or $(EVAL),--eval_dir=/tmp/cifar10_eval_pretrained) $(FLAGS)
exercise: ## check your solution of an exercise: NAME=softmax
solution: ## run the same check on our solution: NAME=softmax
exercise solution:
	$(if $(filter $(NAME),$(EXERCISES)),,$(error NAME=$(NAME) is no exercise. Choose one of: $(EXERCISES)))
	@$(ENVIRONMENT) --with=exercises -- -m exercises.$(NAME) $(if $(filter solution,$@),--solution) $(FLAGS)
experiment: ## train and evaluate an experiment: NAME=faster
	$(if $(filter $(NAME),$(call modules,experiments)),,$(error NAME=$(NAME) is no experiment. Choose one of: $(call modules,experiments)))
	$(RUN) -m experiments.$(NAME) $(DATA) $(TRAIN) $(EVAL) $(FLAGS)

multi-gpu: ## train on several GPUs: ARGS="--num_gpus=2"
	$(RUN) cifar10_multi_gpu_train.py $(DATA) $(TRAIN) $(FLAGS)
cluster: ## train on several machines, simulated on this one: WORKERS=2
	$(RUN) -m support.local_cluster --workers=$(WORKERS) cifar10_distributed_train.py $(DATA) $(TRAIN) $(FLAGS)
convert: ## make a data set of your own pictures: DATA_DIR=/data/mine ARGS=/my/pictures
	$(if $(DATA),,$(error DATA_DIR= is missing. For example: make convert DATA_DIR=/data/mine ARGS=/my/pictures))
	$(RUN) cifar10_convert.py $(DATA) $(FLAGS)
export: ## export a trained model as a SavedModel
	$(RUN) cifar10_export.py $(call folder,export_dir,EXPORT_DIR) $(FLAGS)
record: ## tables, plots and a small checkpoint of the run in TRAIN_DIR, in RECORD_DIR
	@$(ENVIRONMENT) --with=pictures -- results/record.py $(DATA) $(TRAIN) $(call folder,record_dir,RECORD_DIR) $(FLAGS)
	@$(ENVIRONMENT) --with=pictures -- results/pictures.py $(DATA) $(call folder,record_dir,RECORD_DIR) $(FLAGS)

env: ## only build the environment
	@$(ENVIRONMENT)
data: ## only download CIFAR-10 and verify it
	$(RUN) -c 'import cifar10; from support import script; script.run(lambda argv: cifar10.maybe_download_and_extract())' $(DATA) $(FLAGS)

gpu-check: ## train and evaluate briefly on a GPU and print one row of a table
	$(RUN) -m tools.gpu_check $(DATA) $(FLAGS)
test: ## run the tests; they need no data set
	@$(ENVIRONMENT) --with=tests -- -m pytest -q -rs --disable-warnings cifar10_test.py tests $(or $(FLAGS),-n 2 --dist loadgroup)
lint: ## check the style of the code; ARGS=--fix fixes it
	@$(ENVIRONMENT) --with=tests -- -m ruff check $(FLAGS)
	@$(ENVIRONMENT) --with=tests -- -m ruff format $(if $(ARGS),,--check)
soak: $(addprefix soak-,fuzz served kills cluster_kills endurance)
soak: ## malformed files, a served model, kills, endurance: half an hour; some minutes with ARGS=--quick
soak-%:
	@$(ENVIRONMENT) --with=tests -- tests/soak/$*.py $(DATA) $(FLAGS)
bench: ## measure speed, also of PyTorch
	@$(ENVIRONMENT) --torch
	$(RUN) benchmarks/run.py $(DATA) $(FLAGS)

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*##.*/\1/p' Makefile)
