"""How anchors' image processors normalise: two that differ see the same picture as different numbers."""

import logging
import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoImageProcessor

from stitched_llama.space import first_line

logger = logging.getLogger(__name__)


def load_processor(name_or_path: str, trust_remote_code: bool = False, **hub: Any) -> Any:
    """An image processor from its files; no code of a repository is run unless it is trusted.

    Raises:
        ValueError: it is missing or cannot be read.
    """
    try:
        how = {"use_fast": False, "trust_remote_code": trust_remote_code}
        return AutoImageProcessor.from_pretrained(name_or_path, **how, **hub)
    except Exception as error:
        raise ValueError(f"the image processor of {name_or_path} cannot be read: {first_line(error)}") from error


def normalization(name_or_path: str, **hub: Any) -> dict[str, list[float]] | None:
    """Mean and standard deviation by which an anchor's image processor normalises, a value a channel, as shares of the brightest
    number a picture has; None where there is no processor."""
    try:
        processor = load_processor(name_or_path, **hub)
    except ValueError as error:
        logger.debug("%s", error)
        return None
    whole = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", False) else 1)
    mean, std = (processor.image_mean, processor.image_std) if getattr(processor, "do_normalize", False) else (0.0, 1.0)
    mean, std = ([value] if isinstance(value, int | float) else list(value) for value in (mean, std))
    return {"mean": [value / whole for value in mean], "std": [value / whole for value in std]}


def same_normalization(one: dict[str, list[float]] | None, other: dict[str, list[float]] | None) -> bool:
    """Whether two processors give the same numbers, as far as is known."""
    if one is None or other is None:
        return True
    pairs = [(a, b) for name in ("mean", "std") for a, b in _paired(one[name], other[name])]
    return all(math.isclose(a, b, abs_tol=1e-4) for a, b in pairs)


def _paired(one: Sequence[float], other: Sequence[float]) -> list[tuple[float, float]]:
    width = max(len(one), len(other))
    return list(zip(one * width if len(one) == 1 else one, other * width if len(other) == 1 else other))
