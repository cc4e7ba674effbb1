"""Stitching layers and their initialisation: torch only, no model.

stitching      the map at a junction
layouts        features as token features and back
least_squares  streamed fit and R2
"""

from .layouts import from_rows, shared_rows, to_rows, with_own_tokens
from .least_squares import LeastSquares, Residual
from .stitching import Fit, StitchingLayer

__all__ = [
    "Fit",
    "LeastSquares",
    "Residual",
    "StitchingLayer",
    "from_rows",
    "shared_rows",
    "to_rows",
    "with_own_tokens",
]
