"""The space of stitches and their costs: plain values, standard library only (a Hub id needs huggingface_hub).

spec      what a space knows of an anchor
decoders  specs of LLaMA-like decoders
vision_transformers, convolutions   specs of image classifiers; image_parts is what they share
families  which family reads which config.json
configs   reads config.json from a folder or the Hub
rules     which blocks may be joined
adapters  kinds of stitching layers and their cost
stitch    segments, junctions, stitches
cost      exact cost of a route
space     all stitches of a family, in order
budget    what a user can afford
frontier  Pareto front, cost intervals
table     metrics, importance, published stitches, choice by budget
"""

from .adapters import ADAPTER_NORMS, ADAPTERS, RESCALES, StitchingLayerSpec
from .budget import Budget, format_bytes, format_count
from .configs import fields_of, first_line, read_config
from .cost import BYTES_PER_NUMBER, Precision
from .families import ANY_SIZE, anchor_spec, anchor_specs
from .frontier import best_of_intervals, intervals, pareto_front
from .space import DIRECTIONS, PAIRS, SPACE_OPTIONS, StitchSpace
from .spec import AnchorSpec, Feature, Part
from .stitch import Junction, Segment, Stitch
from .table import StitchTable, higher_is_better

__all__ = [
    "ADAPTERS",
    "ADAPTER_NORMS",
    "ANY_SIZE",
    "BYTES_PER_NUMBER",
    "AnchorSpec",
    "Budget",
    "DIRECTIONS",
    "Feature",
    "Junction",
    "PAIRS",
    "Part",
    "Precision",
    "RESCALES",
    "SPACE_OPTIONS",
    "Segment",
    "Stitch",
    "StitchSpace",
    "StitchTable",
    "StitchingLayerSpec",
    "anchor_spec",
    "anchor_specs",
    "best_of_intervals",
    "fields_of",
    "first_line",
    "format_bytes",
    "format_count",
    "higher_is_better",
    "intervals",
    "pareto_front",
    "read_config",
]
