"""Importance scores and sampling of stitches: standard library only.

importance  scores of a step and their moving averages
sampler     the stitch of each step
"""

from .importance import SCORES, Importance, StepSignals
from .sampler import SCHEMES, StitchSampler

__all__ = ["SCHEMES", "SCORES", "Importance", "StepSignals", "StitchSampler"]
