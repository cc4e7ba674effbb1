"""Parameter-efficient stitch fine-tuning: what trains, and nothing else.

config  settings and counts
bias    a bias for each stitch
updates a LoRA that the stitches share, and how both reach the layers
attach  LoRA and low-rank updates through PEFT, everything else frozen
"""

from .attach import (
    attach_pst,
    carries_adapters,
    is_low_rank,
    refuse_another,
    refuse_to_save,
    show_convolutions,
)
from .bias import StitchBias
from .config import PSTConfig
from .updates import StitchLora, Update, biases_of, updates_of

__all__ = [
    "PSTConfig",
    "StitchBias",
    "StitchLora",
    "Update",
    "attach_pst",
    "biases_of",
    "carries_adapters",
    "is_low_rank",
    "refuse_another",
    "refuse_to_save",
    "show_convolutions",
    "updates_of",
]
