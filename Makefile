# Everything one can do here. `make` lists it.
#
#   make train ARGS="--max_steps=500"   ARGS goes to the script as it is (to pytest for `test`)
#   make train TRAIN_DIR=/data/run1     eval and tensorboard take it too, and EVAL_DIR; DATA_DIR all
#   make test TF=2                      TensorFlow 2.x, whatever make would have picked; TF=1 for 1.15

TF        ?=
ARGS      ?=
DATA_DIR   = /tmp/cifar10_data
TRAIN_DIR  = /tmp/cifar10_train
EVAL_DIR   = /tmp/cifar10_eval
RECORD_DIR = /tmp/cifar10_record

# The Pythons that have wheels of TensorFlow 1.15 on Linux and of 2.x, best first.
PYTHONS_TF1 = 3.7
PYTHONS_TF2 = 3.13 3.12 3.11 3.10
# The benchmarks compare with PyTorch on the Python that it was measured on, if there is one.
PYTHONS_TORCH = 3.11 3.12 3.13 3.10

.PHONY: help env data train eval multi-gpu eval-pretrained record test soak bench tensorboard FORCE

help: ## this list
	@echo 'Usage: make TARGET [TF=1|2] [ARGS="--flag=value ..."] [DATA_DIR=...] [TRAIN_DIR=...] [EVAL_DIR=...]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  make %-16s %s\n", $$1, $$2 }'

# --- Which TensorFlow ---------------------------------------------------------
# The reference, 1.15, wherever it can run; 2.x elsewhere. Only `help` needs no answer.

# Shell: prints the first Python of the versions $(1) that can make an environment.
# Each is tried, not only looked for: pyenv leaves a python3.7 on PATH that refuses
# to run while 3.7 is switched off, and Debian ships a Python that lacks venv.
find_python = \
  for v in $(1); do \
    for p in "$$(command -v python$$v)" \
             "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v.*[0-9]/bin/python \
             "$$(uv python find --system $$v 2>/dev/null)"; do \
      "$$p" -c 'import ensurepip, venv' >/dev/null 2>&1 && echo "$$p" && break 2; \
    done; \
  done

ifneq ($(filter-out help,$(MAKECMDGOALS)),)

# Not empty where an NVIDIA driver works.
DRIVER := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

ifneq ($(TF),)
  CHOICE := $(TF)
  WHY    := as you asked
else ifneq ($(shell uname -sm),Linux x86_64)
  CHOICE := 2
  WHY    := there is no 1.15 for $(shell uname -sm)
else ifeq ($(shell $(call find_python,$(PYTHONS_TF1))),)
  CHOICE := 2
  WHY    := 1.15 needs Python $(PYTHONS_TF1), and there is none here
else ifeq ($(DRIVER),)
  CHOICE := 1
  WHY    := the reference (TF=2 picks 2.x, about twice as fast on a CPU)
else
  # Of several GPUs the newest counts. A driver too old to know this query (0 then)
  # is too old for the CUDA of TensorFlow 2.x as well, so 1.15 is the one to try.
  CAPABILITY := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | \
                        awk '$$1 + 0 > max { max = $$1 + 0 } END { print max + 0 }')
  ifeq ($(shell awk 'BEGIN { print ($(CAPABILITY) > 7.5) }'),1)
    CHOICE := 2
    WHY    := the GPU has compute capability $(CAPABILITY), and the CUDA 10.0 of 1.15 ends at 7.5
  else
    CHOICE := 1
    WHY    := the reference (it needs CUDA 10.0 and cuDNN 7 installed; TF=2 picks 2.x, which brings its own CUDA)
  endif
endif

ifeq ($(filter 1 2,$(CHOICE)),)
  $(error TF=$(TF) means nothing: say TF=1 for TensorFlow 1.15, TF=2 for 2.x, or leave it out)
endif

$(info TensorFlow $(if $(filter 1,$(CHOICE)),1.15,2.x) in .venv/tf$(CHOICE): $(WHY).)

endif

# --- Environments -------------------------------------------------------------
# A stamp is made when everything before it has succeeded, so that a build that failed
# or was interrupted is never taken for complete; the next one starts from nothing. It
# is a copy of the requirements: where only their date has changed, nothing is built.

ENV    = .venv/tf$(CHOICE)
PYTHON = $(ENV)/bin/python
# With a driver, TensorFlow 2.x gets the CUDA libraries, also in an environment from before.
READY  = $(ENV)/$(if $(and $(DRIVER),$(filter 2,$(CHOICE))),cuda,ready)

# `python -m`, since the scripts of an environment hold its path and a folder can be moved.
pip_install = $(@D)/bin/python -m pip -qq --disable-pip-version-check install

# Python: runs a command while no other make builds, say for an evaluator in a second terminal.
# Ctrl-C ends the waiting without a traceback.
define IN_TURN
import fcntl, os, signal, sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
lock = os.open('.venv/.lock', os.O_CREAT | os.O_RDWR)
os.set_inheritable(lock, True)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    print('Waiting for another make that is building an environment ...', flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)
os.execvp(sys.argv[1], sys.argv[1:])
endef
export IN_TURN

# Recipe: builds the environment that the target is the stamp of, with one of the Pythons
# $(1), from the first prerequisite. (A pip from before 20.3 does not know the wheels of today.)
define build
	@python=$$($(call find_python,$(1))); \
	if [ -z "$$python" ]; then \
	  echo "No Python for $(@D). Wanted: $(1), with venv; looked on PATH, in pyenv's versions and asked uv." \
	       "Install one (pyenv install $(firstword $(1)), uv python install $(firstword $(1)), or your system's python3 and python3-venv) and run make again." >&2; \
	  exit 1; \
	fi; \
	mkdir -p .venv; \
	"$$python" -c "$$IN_TURN" sh -ec ' \
	  if cmp -s $< $@ && $(@D)/bin/python -V >/dev/null 2>&1; then touch $@; exit; fi; \
	  echo "Building $(@D) with $$("$$0" -V) (takes a minute or more) ..."; \
	  "$$0" -m venv --clear $(@D); \
	  $(pip_install) "pip>=20.3"; \
	  $(pip_install) -r $<; \
	  cp $< $@' "$$python"
endef

# Rebuilt when requirements.txt is newer, or when the Python below it has gone.
$(ENV)/ready: requirements.txt $(if $(shell $(PYTHON) -V 2>/dev/null),,FORCE)
	$(call build,$(PYTHONS_TF$(CHOICE)))

# What is added stays until the environment is built anew (order-only prerequisites).
in_turn = $(@D)/bin/python -c "$$IN_TURN"

$(ENV)/cuda: | $(ENV)/ready
	@echo 'Adding the CUDA libraries (gigabytes; a few minutes) ...'
	@$(in_turn) $(pip_install) -r requirements.txt 'tensorflow[and-cuda]'
	@touch $@

# Whoever only trains needs no pytest. 7.4 is the last for Python 3.7.
$(ENV)/pytest: | $(READY)
	@$(in_turn) $(pip_install) 'pytest>=7.4,<10'
	@touch $@

$(ENV)/matplotlib: | $(READY)
	@$(in_turn) $(pip_install) 'matplotlib>=3.5'
	@touch $@

.venv/torch/ready: benchmarks/requirements.txt
	$(call build,$(PYTHONS_TORCH))

FORCE:

# --- What one can do ----------------------------------------------------------
# Every script fetches the data set by itself where it is missing. `exec`, so that a
# signal sent to make reaches the script and not a shell in between.

env: $(READY) ## build the Python environment
	@echo 'Ready. To run the scripts without make: . $(ENV)/bin/activate'

data: $(READY) ## get CIFAR-10 and verify it
	@exec $(PYTHON) -m support.dataset --data_dir="$(DATA_DIR)" $(ARGS)

train: $(READY) ## train on one device; goes on where the last run stopped
	@exec $(PYTHON) cifar10_train.py --data_dir="$(DATA_DIR)" --train_dir="$(TRAIN_DIR)" $(ARGS)

multi-gpu: $(READY) ## train on several GPUs: ARGS="--num_gpus=2"
	@exec $(PYTHON) cifar10_multi_gpu_train.py --data_dir="$(DATA_DIR)" --train_dir="$(TRAIN_DIR)" $(ARGS)

eval: $(READY) ## measure the newest checkpoint, and each one that follows
	@exec $(PYTHON) cifar10_eval.py --data_dir="$(DATA_DIR)" --checkpoint_dir="$(TRAIN_DIR)" --eval_dir="$(EVAL_DIR)" $(ARGS)

eval-pretrained: $(READY) ## measure the trained model that comes along, in results/
	@exec $(PYTHON) cifar10_eval.py --data_dir="$(DATA_DIR)" --checkpoint_dir=results --eval_dir="$(EVAL_DIR)_pretrained" --run_once $(ARGS)

record: $(ENV)/matplotlib ## tables, pictures and a small model of the run in TRAIN_DIR
	@exec $(PYTHON) results/record.py --data_dir="$(DATA_DIR)" --train_dir="$(TRAIN_DIR)" --record_dir="$(RECORD_DIR)" $(ARGS)
	@exec $(PYTHON) results/pictures.py --data_dir="$(DATA_DIR)" --record_dir="$(RECORD_DIR)" $(ARGS)

test: $(ENV)/pytest ## run the tests (no data set needed)
	@exec $(PYTHON) -m pytest -rs --disable-warnings cifar10_test.py $(ARGS)

soak: $(ENV)/pytest ## malformed input, kills and endurance: 90 minutes; ARGS=--quick: some
	@exec $(PYTHON) tests/soak/fuzz.py $(filter --quick,$(ARGS))
	@exec $(PYTHON) tests/soak/kills.py --data_dir="$(DATA_DIR)" $(ARGS)
	@exec $(PYTHON) tests/soak/endurance.py --data_dir="$(DATA_DIR)" $(ARGS)

bench: $(READY) .venv/torch/ready ## measure what is claimed about speed
	@exec $(PYTHON) benchmarks/run.py --data_dir="$(DATA_DIR)" $(ARGS)

# A folder of two links gives both generations of TensorBoard runs called `train` and
# `eval`, also before there is anything in them.
tensorboard: $(READY) ## show the training and the evaluation in the browser
	@mkdir -p .tensorboard
	@ln -sfn "$(if $(filter /%,$(TRAIN_DIR)),,../)$(TRAIN_DIR)" .tensorboard/train
	@ln -sfn "$(if $(filter /%,$(EVAL_DIR)),,../)$(EVAL_DIR)" .tensorboard/eval
	@TF_CPP_MIN_LOG_LEVEL=3 exec $(PYTHON) -W ignore::FutureWarning -m tensorboard.main --logdir .tensorboard --host localhost $(ARGS)
