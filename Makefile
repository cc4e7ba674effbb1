# `make demo` and `make test` set up everything they need in .venv; nothing but Python, make and the package index.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

ANCHORS := data/anchors/small data/anchors/large
# The demo's setting: byte-level rows of some 50 tokens, one batch of 16 a step; the anchors alone share as many steps.
DEMO := --anchors $(ANCHORS) --data $(OUT)/data/train.json --eval_data $(OUT)/data/heldout.json --eval_size 960 \
  --template short --max_length 128 --dtype float32 --rank 32 --max_steps 1200 --learning_rate 6e-3 --weight_decay 1e-4 \
  --warmup_steps 0.06 --per_device_train_batch_size 16 --global_batch_size 16 --per_device_eval_batch_size 96 \
  --logging_steps 50 --use_cpu

VISION := $(OUT)-vision
.PHONY: setup demo demo-vision evidence test lint fuzz clean

setup: $(BIN)/.ready

$(BIN)/.ready: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test]"
	touch $@

demo: setup
	$(BIN)/python data/skills.py --output $(OUT)/data
	$(BIN)/python recipes/lora_baseline.py $(DEMO) --max_steps 600 --rows $(OUT)/baselines.json --output_dir $(OUT)/alone
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  recipes/finetune_alpaca.py $(DEMO) --no_load_in_8bit --baselines $(OUT)/baselines.json --output_dir $(OUT) \
	  --save_strategy no

# Three ViTs made here on seven of scikit-learn's digits, adapted to all ten with ten pictures a class.
demo-vision: setup
	$(BIN)/python data/make_vits.py --output $(VISION)
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  recipes/finetune_vision.py --anchors $(VISION)/anchors/tiny $(VISION)/anchors/small $(VISION)/anchors/base \
	  --data $(VISION)/digits.npz --shots 10 --no_augment --rank 32 16 8 --max_steps 900 --global_batch_size 32 \
	  --per_device_train_batch_size 32 --base_lr 0.04 --logging_steps 50 --save_strategy no --use_cpu --output_dir $(VISION)

# The papers' claims on digits; two and a half hours on 2 cores. Rows that are done are read again.
evidence: setup
	$(BIN)/python benchmarks/evidence.py

test: setup lint
	$(BIN)/python -m pytest -q

# Thousands of damaged, edited and hostile inputs, each right or refused by name.
fuzz: setup
	$(BIN)/python tests/fuzz.py --full --out benchmarks/results/reliability.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs *.egg-info
