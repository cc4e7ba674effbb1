"""Fine-tuning, evaluation of every stitch, plots.

tables      rows from files, folders, saved data sets and the Hub
rows        instruction rows in Alpaca's schema: validation, skipped rows, held-out rows
prompts     prompt templates, also as chat templates
data        instruction rows as labelled batches of token ids
image_files one image from a file or an array; labels as class numbers
images      labelled images from arrays, folders and data sets
image_sets  labelled images as batches
arguments   training arguments
checks      checks before a run starts, and of each batch
finite      losses, gradients and weights that are not finite end a run
interruption   SIGTERM ends a run with a checkpoint
trainer     one stitch a step, distilled from the largest anchor; image_trainer for images
reports     logging, and evaluation during a run
evaluation  loss and exact match of every stitch
distillation  targets from teacher logits and the student's loss on them
phases      anchors first, then the stitches
param_groups  the parameters of anchors and stitches apart
checkpoints which checkpoint to resume from
route_search  routes or junctions of low loss, by measurement
settings    settings that a resumed run shares with its checkpoint, and those that may differ
plots       plot and table of a run
provenance  date, commit, command, versions and machine of a result
samples     answers to the same prompts from several stitches
smoke       pico anchors for --smoke and tests
hooks       private members of Transformers that the package depends on
"""

from stitched_llama.models.processors import load_processor
from stitched_llama.models.references import check_source
from stitched_llama.models.tokenizers import load_tokenizer
from stitched_llama.space import SpaceArguments

from .arguments import (
    DISTILLATIONS,
    ImageDataArguments,
    ImageTrainingArguments,
    PSTArguments,
    StitchTrainingArguments,
    TextDataArguments,
    recipe_parser,
)
from .checkpoints import find_checkpoint, is_published
from .checks import check_arguments, check_launch
from .data import Collator, InstructionDataset, batches, pad_token_id
from .evaluation import evaluate_plain, evaluate_stitches, image_scores, response_scores, spearman
from .finite import FiniteGradients
from .image_sets import EpochOfAugmentation, ImageSet, collate_images
from .image_trainer import StitchImageTrainer
from .images import IMAGE_TASKS, few_shot, read_images, some_of
from .plots import format_gains, format_table, plot_stitches, read_baselines
from .prompts import TEMPLATES, Template, encode_prompt, end_ids, render_chat, template
from .provenance import dump_record, provenance, redacted
from .route_search import RouteProposal, measured_options, propose_routes
from .rows import Row, drawn, read_parts, read_rows, split_rows
from .samples import sample_budgets
from .settings import check_settings, run_settings
from .smoke import byte_tokenizer, pico_anchor, smoke_anchors
from .trainer import StitchTrainer

__all__ = [
    "DISTILLATIONS",
    "TEMPLATES",
    "IMAGE_TASKS",
    "Collator",
    "EpochOfAugmentation",
    "FiniteGradients",
    "ImageDataArguments",
    "ImageSet",
    "ImageTrainingArguments",
    "InstructionDataset",
    "RouteProposal",
    "Row",
    "PSTArguments",
    "SpaceArguments",
    "StitchImageTrainer",
    "StitchTrainer",
    "StitchTrainingArguments",
    "Template",
    "TextDataArguments",
    "batches",
    "byte_tokenizer",
    "check_arguments",
    "check_launch",
    "check_settings",
    "check_source",
    "collate_images",
    "dump_record",
    "evaluate_plain",
    "evaluate_stitches",
    "drawn",
    "encode_prompt",
    "end_ids",
    "few_shot",
    "find_checkpoint",
    "format_gains",
    "format_table",
    "load_processor",
    "load_tokenizer",
    "measured_options",
    "pad_token_id",
    "pico_anchor",
    "image_scores",
    "is_published",
    "plot_stitches",
    "propose_routes",
    "provenance",
    "read_baselines",
    "read_images",
    "read_parts",
    "read_rows",
    "recipe_parser",
    "redacted",
    "render_chat",
    "response_scores",
    "run_settings",
    "sample_budgets",
    "smoke_anchors",
    "spearman",
    "some_of",
    "split_rows",
    "template",
]
