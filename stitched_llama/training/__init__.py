"""Fine-tuning, evaluation of every stitch, plots.

prompts     templates, also as chat templates
data        rows in Alpaca's schema to labelled batches
arguments   training arguments
trainer     one stitch a step, the largest anchor as teacher
evaluation  loss and exact match of every stitch
plots       the picture and the table of a run
record      where a result comes from
samples     the same prompts at several sizes
smoke       pico anchors for --smoke and tests
"""

from .arguments import DISTILLATIONS, StitchTrainingArguments
from .data import Collator, InstructionDataset, Row, batches, pad_token_id, read_rows, split_rows
from .evaluation import evaluate_stitches, response_scores, spearman
from .plots import format_table, plot_stitches
from .prompts import TEMPLATES, Template, template
from .record import dump_record, provenance
from .samples import sample_budgets
from .smoke import byte_tokenizer, pico_anchor, smoke_anchors
from .trainer import StitchTrainer, find_checkpoint

__all__ = [
    "DISTILLATIONS",
    "TEMPLATES",
    "Collator",
    "InstructionDataset",
    "Row",
    "StitchTrainer",
    "StitchTrainingArguments",
    "Template",
    "batches",
    "byte_tokenizer",
    "dump_record",
    "evaluate_stitches",
    "find_checkpoint",
    "format_table",
    "pad_token_id",
    "pico_anchor",
    "plot_stitches",
    "provenance",
    "read_rows",
    "response_scores",
    "sample_budgets",
    "smoke_anchors",
    "spearman",
    "split_rows",
    "template",
]
