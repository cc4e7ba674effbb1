"""Shrinking: a small anchor cut out of a large one and distilled so that the two can be stitched.

cut           initialisation of the small model from blocks, channels, heads and units of the large one
distillation  distillation loss and alignment of block outputs
trainer       `transformers.Trainer` for it, and its arguments
save          the small model as a plain Transformers folder with a model card
delta         the small model as a 4-bit difference from its initialisation
text          unlabelled text and chat data in blocks of tokens
"""

from .cut import Cut, check_lineage, cut_model, heads_for_width
from .delta import load_delta, save_delta
from .distillation import ShrinkDistillation
from .save import check_folder, save_shrunk
from .text import TokenBlocks, read_documents, row_renderer
from .trainer import ShrinkArguments, ShrinkTrainer

__all__ = [
    "Cut",
    "ShrinkArguments",
    "ShrinkDistillation",
    "ShrinkTrainer",
    "TokenBlocks",
    "check_folder",
    "check_lineage",
    "cut_model",
    "heads_for_width",
    "load_delta",
    "read_documents",
    "row_renderer",
    "save_delta",
    "save_shrunk",
]
