"""Stitching layers and how they are initialised: torch alone, no model.

stitching      the map at a junction
least_squares  streamed fit and R2
"""

from .least_squares import LeastSquares, Residual
from .stitching import StitchingLayer

__all__ = ["LeastSquares", "Residual", "StitchingLayer"]
