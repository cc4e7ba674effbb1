"""Metrics of a stitch and their direction."""

HIGHER_IS_BETTER = {"loss": False, "exact_match": True, "accuracy": True}


def higher_is_better(metric: str) -> bool:
    """The direction of a metric; `loss_before` (before training) and `loss_test` (on test rows) have that of `loss`.

    Raises:
        ValueError: the metric is unknown.
    """
    try:
        return HIGHER_IS_BETTER[metric.removesuffix("_before").removesuffix("_test")]
    except KeyError:
        raise ValueError(f"metric {metric!r} is unknown; one of {', '.join(HIGHER_IS_BETTER)} is needed") from None
