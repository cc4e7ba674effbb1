# `make demo` and `make test` set up everything they need in .venv; nothing but Python, make and the package index.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
REAL ?= runs/demo-real
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1
export PYTHONWARNINGS ?= ignore::FutureWarning

# A real model (SmolLM2-135M-Instruct, 30 blocks) and a student of 16 blocks that `stitched-llama shrink` made of it, stored as a
# difference of 4 bits. Rows: what Python's own documentation says.
FAMILY = --anchors $(1)/small $(1)/large --data $(1)/data/train.json --eval_data $(1)/data/heldout.json --template auto \
  --max_length 192 --no_load_in_8bit --rank 16 --stitch_rank 32 --learning_rate 1e-3 --weight_decay 0 --warmup_steps 0.05 \
  --distillation soft --sampling interval --per_device_train_batch_size 8 --global_batch_size 8 --per_device_eval_batch_size 8 \
  --train_sampling_strategy group_by_length --calibration_size 8 --logging_steps 10 --save_strategy no --use_cpu
# Eight of the sizes that `--routes greedy` finds, which takes some 150 evaluations
ROUTES := "0[0:12]>1[23:27]>0[14:16]" "0[0:12]>1[23:29]>0[15:16]" "0[0:11]>1[21:29]>0[15:16]" \
  "0[0:7]>1[13:15]>0[8:10]>1[19:29]>0[15:16]" "0[0:5]>1[9:11]>0[6:7]>1[13:15]>0[8:10]>1[19:29]>0[15:16]" \
  "1[0:1]>0[1:5]>1[9:17]>0[9:10]>1[19:30]" "1[0:5]>0[3:5]>1[9:17]>0[9:10]>1[19:30]" "1[0:17]>0[9:10]>1[19:30]"
LAUNCH := $(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

VISION := $(OUT)-vision
.PHONY: setup demo demo-real demo-vision evidence test lint fuzz clean

setup: $(BIN)/.ready

$(BIN)/.ready: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[test]"
	touch $@

define family
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python demo/make_smollm2.py $(1) --student data/smollm2-16
	$(BIN)/python demo/documentation.py --output $(1)/data
endef

# Ten sizes, 100 steps of 8 rows, 60 of them for the two anchors.
demo: setup
	$(call family,$(OUT))
	$(LAUNCH) recipes/finetune_alpaca.py $(call FAMILY,$(OUT)) --adapter identity --routes $(ROUTES) --interval_count 8 \
	  --eval_size 64 --max_steps 100 --no_evaluate_before --output_dir $(OUT)

# All fifteen sizes: routes searched, evaluated before and after 200 steps.
demo-real: setup
	$(call family,$(REAL))
	$(LAUNCH) recipes/finetune_alpaca.py $(call FAMILY,$(REAL)) --routes greedy --calibration_size 24 --interval_count 13 --eval_size 64 \
	  --max_steps 200 --output_dir $(REAL)

# Three ViTs made here on seven of scikit-learn's digits, adapted to all ten with ten pictures a class.
demo-vision: setup
	$(BIN)/python data/make_vits.py --output $(VISION)
	$(LAUNCH) recipes/finetune_vision.py --anchors $(VISION)/anchors/tiny $(VISION)/anchors/small $(VISION)/anchors/base \
	  --data $(VISION)/digits.npz --shots 10 --no_augment --rank 32 16 8 --max_steps 900 --global_batch_size 32 \
	  --per_device_train_batch_size 32 --base_lr 0.04 --logging_steps 50 --save_strategy no --use_cpu --output_dir $(VISION)

# The papers' claims on digits; two and a half hours on 2 cores. Rows that are done are read again.
evidence: setup
	$(BIN)/python benchmarks/evidence.py

test: setup lint
	$(BIN)/python -m pytest -q

# With the tests marked slow
.PHONY: test-all
test-all: setup lint
	$(BIN)/python -m pytest -q -m "not gpu and not hub"

# Thousands of damaged, edited and hostile inputs, each right or refused by name.
fuzz: setup
	$(BIN)/python tests/fuzz.py --full --out benchmarks/results/reliability.json

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs *.egg-info
