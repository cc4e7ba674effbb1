"""Stitching layers and how they are initialised: torch alone, no model.

stitching      the map at a junction
layouts        features as rows and back
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
