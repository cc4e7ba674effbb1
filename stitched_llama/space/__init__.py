"""The space of stitches and their costs: plain values, standard library only (a Hub id needs huggingface_hub).

spec      sizes of an anchor
fields    fields of a config.json, checked for type and range
text      printable text and errors of other libraries in one line
decoders  specs of LLaMA-like decoders
vision_transformers, convolutions   specs of image classifiers; image_parts is shared by them
lineage   shrunk_from: the model that a shrunk anchor was cut from
families  the spec function of each model_type
configs   reads config.json from a folder or the Hub
rules     which blocks may be joined
given     explicit junctions and routes
adapters  kinds of stitching layers and their cost
stitch    segments, junctions, stitches
cost      exact cost of a route
space     all stitches of a set of anchors, in order
options   options of a space on a command line
budget    limits on parameters, memory or MACs
frontier  Pareto front, cost intervals
metrics   direction of a metric
palette   palette gain
table     metrics, importance, published stitches, choice by budget
"""

from .adapters import ADAPTER_NORMS, ADAPTERS, RESCALES, StitchingLayerSpec
from .budget import Budget, format_bytes, format_count
from .configs import fields_of, read_config, read_object
from .cost import BYTES_PER_NUMBER, Precision
from .decoders import LLAMA_LIKE
from .families import ANY_SIZE, anchor_spec, anchor_specs
from .frontier import best_of_intervals, intervals, pareto_front
from .given import MOST_STITCHES, parse_junctions, resolve_junctions
from .lineage import aligned_junctions, block_groups, lineage_of, replaced_blocks
from .metrics import higher_is_better
from .options import ImageSpaceArguments, SpaceArguments
from .palette import palette_gain, palette_gains, staircase_gain
from .space import DIRECTIONS, PAIRS, SPACE_OPTIONS, StitchSpace
from .spec import AnchorSpec, Feature, Part
from .stitch import KEYS, Junction, Segment, Stitch, route_key
from .table import StitchTable
from .text import first_line, named, printable

__all__ = [
    "staircase_gain",
    "ADAPTERS",
    "ADAPTER_NORMS",
    "ANY_SIZE",
    "BYTES_PER_NUMBER",
    "AnchorSpec",
    "Budget",
    "DIRECTIONS",
    "Feature",
    "ImageSpaceArguments",
    "Junction",
    "KEYS",
    "LLAMA_LIKE",
    "MOST_STITCHES",
    "PAIRS",
    "Part",
    "Precision",
    "RESCALES",
    "SPACE_OPTIONS",
    "Segment",
    "SpaceArguments",
    "Stitch",
    "StitchSpace",
    "StitchTable",
    "StitchingLayerSpec",
    "aligned_junctions",
    "anchor_spec",
    "anchor_specs",
    "best_of_intervals",
    "block_groups",
    "fields_of",
    "first_line",
    "format_bytes",
    "format_count",
    "higher_is_better",
    "intervals",
    "lineage_of",
    "named",
    "palette_gain",
    "palette_gains",
    "pareto_front",
    "parse_junctions",
    "printable",
    "read_config",
    "read_object",
    "replaced_blocks",
    "resolve_junctions",
    "route_key",
]
