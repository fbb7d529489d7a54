# Everything one can do here. `make` lists it.
#
#   make train ARGS="--max_steps=500"   ARGS goes to the script as it is (to pytest for `test`)
#   make train TRAIN_DIR=/data/run1     eval and tensorboard take it too, and EVAL_DIR; DATA_DIR all
#   make test TF=2                      TensorFlow 2.x, whatever make would have picked; TF=1 for 1.15

DATA_DIR   = /tmp/cifar10_data
TRAIN_DIR  = /tmp/cifar10_train
EVAL_DIR   = /tmp/cifar10_eval
RECORD_DIR = /tmp/cifar10_record
EXPORT_DIR = /tmp/cifar10_export
WORKERS    = 1
PS         = 0
NAME       = softmax

.PHONY: help env data train eval multi-gpu cluster eval-pretrained predict export convert exercise experiment record tensorboard test soak lint bench
help: ## this list
	@echo 'Usage: make TARGET [TF=1|2] [ARGS="--flag=value ..."] [DATA_DIR=...] [TRAIN_DIR=...] [EVAL_DIR=...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'

# --- Which TensorFlow ---------------------------------------------------------

# The Pythons that have wheels of TensorFlow 1.15 on Linux and of 2.x, best first.
PYTHONS_1 = 3.7
PYTHONS_2 = 3.13 3.12 3.11 3.10

# Shell: prints the first Python of the versions $(1) that can make an environment. Each is
# tried, since pyenv leaves some on PATH that refuse to run, and Debian's may lack venv.
find_python = for v in $(1); do \
    for p in "$$(command -v python$$v)" "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*[0-9]/bin/python \
             "$$(uv python find --system $$v 2>/dev/null)"; do \
      "$$p" -c 'import ensurepip, venv' >/dev/null 2>&1 && echo "$$p" && break 2; \
    done; \
  done

ifneq ($(filter-out help,$(MAKECMDGOALS)),)
# The newest GPU's compute capability, 0 from a driver too old to tell; empty without a driver.
CAPABILITY := $(shell nvidia-smi -L >/dev/null 2>&1 && nvidia-smi --query-gpu=compute_cap \
  --format=csv,noheader | awk '$$1 + 0 > max { max = $$1 + 0 } END { print max + 0 }')

# The reference, 1.15, wherever it can run.
ifneq ($(TF),)
  WHY := $(TF): as you asked
else ifneq ($(shell uname -sm),Linux x86_64)
  WHY := 2: there is no 1.15 for $(shell uname -sm)
else ifeq ($(shell $(call find_python,$(PYTHONS_1))),)
  WHY := 2: 1.15 needs Python $(PYTHONS_1), and there is none here
else ifeq ($(CAPABILITY),)
  WHY := 1: the reference (TF=2 picks 2.x, about twice as fast on a CPU)
else ifeq ($(shell awk 'BEGIN { print ($(CAPABILITY) > 7.5) }'),1)
  WHY := 2: the GPU has compute capability $(CAPABILITY), and the CUDA 10.0 of 1.15 ends at 7.5
else
  WHY := 1: the reference (it needs CUDA 10.0 and cuDNN 7 installed; TF=2 brings its own CUDA)
endif
CHOICE := $(firstword $(subst :, ,$(WHY)))
ifeq ($(filter 1 2,$(CHOICE)),)
  $(error TF=$(TF) means nothing: say TF=1 for TensorFlow 1.15, TF=2 for 2.x, or leave it out)
endif
$(info TensorFlow $(if $(filter 1,$(CHOICE)),1.15,2.x) in .venv/tf$(CHOICE)$(patsubst $(CHOICE):%,:%,$(WHY)).)
endif

# --- Environments -------------------------------------------------------------

ENV    = .venv/tf$(CHOICE)
PYTHON = $(ENV)/bin/python
READY  = $(ENV)/$(if $(and $(CAPABILITY),$(filter 2,$(CHOICE))),cuda,ready)

# `python -m`, since the scripts of an environment hold its path and a folder can be moved.
pip_install = $(@D)/bin/python -m pip -qq --disable-pip-version-check install

# Recipe: builds the environment that the target is the stamp of, with one of the Pythons $(1),
# from the first prerequisite, of which the stamp becomes a copy: at the end, so that what was
# interrupted is never taken for complete. The folder .lock keeps a second make out meanwhile.
define build
	@cmp -s $< $@ && $(@D)/bin/python -V >/dev/null 2>&1 && touch $@ && exit; \
	python=$$($(call find_python,$(1))); \
	[ "$$python" ] || { echo "No Python for $(@D). Wanted: $(1), with venv, on PATH, from pyenv or uv." >&2; exit 1; }; \
	mkdir -p .venv; mkdir $(@D).lock || { echo 'Another make builds it. Wait; or, if none does, remove that folder.' >&2; exit 1; }; \
	trap 'rmdir $(@D).lock' EXIT; trap 'exit 1' INT TERM; \
	echo "Building $(@D) with $$("$$python" -V) (takes a minute or more) ..."; \
	"$$python" -m venv --clear $(@D) && $(pip_install) 'pip>=20.3' && $(pip_install) -r $< && cp $< $@
endef

# Rebuilt when requirements.txt has changed, or when the Python below it has gone.
$(ENV)/ready: requirements.txt $(if $(shell $(PYTHON) -V 2>/dev/null),,FORCE)
	$(call build,$(PYTHONS_$(CHOICE)))
.venv/torch/ready: benchmarks/requirements.txt
	$(call build,3.11 3.12 3.13 3.10)
FORCE:

# What only some targets need. 7.4 is the last pytest for Python 3.7.
PACKAGES_cuda     = -r requirements.txt 'tensorflow[and-cuda]'
PACKAGES_pictures  = 'matplotlib>=3.5'
PACKAGES_exercises = $(PACKAGES_pictures) scikit-learn
PACKAGES_tests     = 'pytest>=7.4,<10' 'ruff>=0.14,<1' $(PACKAGES_exercises) pillow 'pyyaml>=5'
$(ENV)/cuda: $(ENV)/ready
$(ENV)/tests $(ENV)/exercises $(ENV)/pictures: $(READY)
$(ENV)/tests $(ENV)/exercises $(ENV)/pictures: Makefile
$(ENV)/cuda $(ENV)/tests $(ENV)/exercises $(ENV)/pictures:
	@echo 'Adding what is needed for $(@F) ...'
	@$(pip_install) $(PACKAGES_$(@F)) && touch $@

# --- What one can do ----------------------------------------------------------
# `exec`, so that a signal sent to make reaches the script and not a shell in between.

RUN  = @exec $(PYTHON)
DATA = --data_dir="$(DATA_DIR)"

env: $(READY) ## build the Python environment; `. .venv/tf1/bin/activate` enters it
data: $(READY) ## get CIFAR-10 and verify it; every script does it by itself
	@$(PYTHON) -c 'import cifar10; from support import script; script.run(cifar10.maybe_download_and_extract)' $(DATA) $(ARGS)
	@echo 'The data set in $(DATA_DIR) is complete.'
train: $(READY) ## train on one device; goes on where the last run stopped
	$(RUN) cifar10_train.py $(DATA) --train_dir="$(TRAIN_DIR)" $(ARGS)
multi-gpu: $(READY) ## train on several GPUs: ARGS="--num_gpus=2"
	$(RUN) cifar10_multi_gpu_train.py $(DATA) --train_dir="$(TRAIN_DIR)" $(ARGS)
cluster: $(READY) ## several machines, tried on this one: WORKERS=2 PS=1
	$(RUN) -m support.local_cluster --workers=$(WORKERS) --ps=$(PS) cifar10_distributed_train.py $(DATA) --train_dir="$(TRAIN_DIR)" $(ARGS)
eval: $(READY) ## measure the newest checkpoint, and each one that follows
	$(RUN) cifar10_eval.py $(DATA) --checkpoint_dir="$(TRAIN_DIR)" --eval_dir="$(EVAL_DIR)" $(ARGS)
eval-pretrained: $(READY) ## measure the trained model that comes along, in results/
	$(RUN) cifar10_eval.py $(DATA) --checkpoint_dir=results --eval_dir="$(EVAL_DIR)_pretrained" --run_once $(ARGS)
predict: $(READY) ## say what is in a picture: ARGS=cat.jpg
	$(RUN) cifar10_predict.py $(ARGS)
export: $(READY) ## the trained model that comes along, or another, as a SavedModel to be served
	$(RUN) cifar10_export.py --export_dir="$(EXPORT_DIR)" $(ARGS)
convert: $(READY) ## a data set of pictures of your own: DATA_DIR=/data/mine ARGS=/my/pictures
	$(RUN) cifar10_convert.py $(if $(filter command,$(origin DATA_DIR)),$(DATA)) $(ARGS)
exercise: $(ENV)/exercises ## the tutorial's exercises, solved: NAME=softmax, or another in exercises/
	$(RUN) exercises/$(NAME).py $(if $(filter command,$(origin DATA_DIR)),$(DATA)) $(ARGS)
experiment: $(READY) ## train and evaluate by another recipe: NAME=faster, or another in experiments/
	$(RUN) -m experiments.$(NAME) $(DATA) $(ARGS)
tensorboard: $(READY) ## show the training and the evaluation in the browser
	$(RUN) -W ignore -m tensorboard.main --host localhost --logdir$(if $(filter 2,$(CHOICE)),_spec) "train:$(TRAIN_DIR),eval:$(EVAL_DIR)" $(ARGS)
record: $(ENV)/pictures ## tables, pictures and a small model of the run in TRAIN_DIR
	$(RUN) results/record.py $(DATA) --train_dir="$(TRAIN_DIR)" --record_dir="$(RECORD_DIR)" $(ARGS)
	$(RUN) results/pictures.py $(DATA) --record_dir="$(RECORD_DIR)" $(ARGS)
test: $(ENV)/tests ## run the tests (no data set needed)
	$(RUN) -m pytest -rs --disable-warnings cifar10_test.py tests $(ARGS)
soak: $(ENV)/tests ## malformed input, a served model, kills, endurance: 2.5 hours; ARGS=--quick: some
	$(RUN) tests/soak/fuzz.py $(filter --quick,$(ARGS))
	$(RUN) tests/soak/served.py $(DATA) $(ARGS)
	$(RUN) tests/soak/kills.py $(DATA) $(ARGS)
	$(RUN) tests/soak/cluster_kills.py $(DATA) $(ARGS)
	$(RUN) tests/soak/endurance.py $(DATA) $(ARGS)
lint: $(ENV)/tests ## check the style of the code; ARGS=--fix mends what it can
	$(RUN) -m ruff check $(ARGS)
	$(RUN) -m ruff format $(if $(ARGS),,--check)
bench: $(READY) .venv/torch/ready ## measure what is claimed about speed
	$(RUN) benchmarks/run.py $(DATA) $(ARGS)
