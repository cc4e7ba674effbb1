"""The table a bundle carries: what is known of each stitch, which are published, and the choice by budget."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

from .budget import Budget, format_bytes, format_count
from .fields import MOST
from .frontier import best_of_intervals, pareto_front
from .space import StitchSpace
from .stitch import Stitch

HIGHER_IS_BETTER = {"loss": False, "exact_match": True, "accuracy": True}


def higher_is_better(metric: str) -> bool:
    """The direction of a metric; `loss_before` (untrained) and `loss_test` (rows that choose nothing) go as `loss` does.

    Raises:
        ValueError: the metric is unknown.
    """
    try:
        return HIGHER_IS_BETTER[metric.removesuffix("_before").removesuffix("_test")]
    except KeyError:
        raise ValueError(f"metric {metric!r} is unknown; one of {', '.join(HIGHER_IS_BETTER)} is needed") from None


@dataclass(frozen=True)
class StitchTable:
    """What training and evaluation found out about the stitches of a space.

    Attributes:
        metrics: metric name -> key -> value, such as `metrics["loss"]["0[0:6]"]`.
        importance: key -> importance score at the end of training.
        visits: key -> steps that rated the stitch.
        metric: the metric that decides; one of `metrics`, or None before any evaluation.
        interval_count: cost intervals of training, for choosing by importance.
        importance_score: what `importance` averages; averages of different scores do not mix.
        alone: key of an anchor -> metric name -> value of that anchor fine-tuned alone, for `palette_gain`.
    """

    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    metric: str | None = None
    interval_count: int = 6
    importance_score: str | None = None
    visits: Mapping[str, int] = field(default_factory=dict)
    alone: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def with_metrics(self, name: str, values: Mapping[str, float], decides: bool = False) -> "StitchTable":
        """A table that also holds `values`; the first metric, or one that `decides`, rules what is published.

        Raises:
            ValueError: the direction of the metric is unknown.
        """
        higher_is_better(name)
        metrics = {**self.metrics, name: dict(values)}
        metric = name if decides or self.metric is None else self.metric
        return replace(self, metrics=metrics, metric=metric)

    def without_metrics(self, names: Iterable[str]) -> "StitchTable":
        """A table that holds none of these metrics; where one of them decided, none does."""
        names = set(names)
        metrics = {name: values for name, values in self.metrics.items() if name not in names}
        return replace(self, metrics=metrics, metric=None if self.metric in names else self.metric)

    @property
    def deciding(self) -> str | None:
        """The metric that decides: what was measured before training does not, once training rated the stitches."""
        stale = self.metric is not None and self.metric.endswith("_before") and self.importance
        return None if stale else self.metric

    def in_training(self) -> "StitchTable":
        """A table in which nothing that was measured before training decides."""
        return replace(self, metric=None) if (self.metric or "").endswith("_before") else self

    def published(self, stitches: Iterable[Stitch]) -> list[str]:
        """Keys a budget may choose from, ascending in parameters.

        The Pareto front of the deciding metric; before any evaluation the most important stitch of each interval and
        the anchors; before any training the anchors alone, as nothing is known of the others. Where none of these is
        among `stitches`, all of them.
        """
        stitches, metric = list(stitches), self.deciding
        if metric is not None:
            front = pareto_front(stitches, self.metrics[metric], higher_is_better(metric))
            return front or [stitch.key for stitch in stitches]
        chosen = set(best_of_intervals(stitches, self.importance, self.interval_count))
        return [s.key for s in stitches if s.key in chosen or s.is_anchor] or [s.key for s in stitches]

    def choose(
        self, space: StitchSpace, budget: Any, context_tokens: int = 0, keys: Iterable[str] | None = None
    ) -> Stitch:
        """The best published stitch that fits; a larger budget never returns a worse recorded metric.

        Args:
            budget: anything `Budget.parse` reads.
            context_tokens: tokens the KV cache must hold, for a budget of memory.
            keys: the stitches at hand (all of the space by default).

        Raises:
            ValueError: the budget cannot be read, or is below the smallest published stitch.
        """
        budget = Budget.parse(budget)
        wanted = None if keys is None else set(keys)
        at_hand = [stitch for stitch in space if wanted is None or stitch.key in wanted]
        published = [space[key] for key in self.published(at_hand)]
        fitting = [stitch for stitch in published if budget.fits(stitch, context_tokens)]
        if not fitting:
            smallest = min(published, key=lambda stitch: budget.cost_of(stitch, context_tokens))
            show = format_bytes if budget.kind == "memory_bytes" else format_count
            size = "smallest size" if len(at_hand) == len(space) else f"smallest of the {len(at_hand)} loaded sizes"
            raise ValueError(
                f"budget {budget.text!r} is too small: the {size} is stitch {smallest.stitch_id} "
                f"({smallest.key}) and needs {show(budget.cost_of(smallest, context_tokens))} "
                f"{budget.kind.replace('_', ' ')}" + (f" with {context_tokens} tokens" if context_tokens else "")
            )
        return max(fitting, key=self._quality)

    def _quality(self, stitch: Stitch) -> tuple[float, int]:
        if self.deciding is None:
            return 0.0, stitch.params
        value = self.metrics[self.deciding].get(stitch.key, math.nan)
        if not math.isfinite(value):
            return float("-inf"), stitch.params
        return (value if higher_is_better(self.deciding) else -value), stitch.params

    def to_rows(self, stitches: Iterable[Stitch]) -> list[dict[str, Any]]:
        """One JSON object a stitch: the space's fields, importance, metrics, and whether it is published."""
        stitches = list(stitches)
        published = set(self.published(stitches))
        rows = []
        for stitch in stitches:
            row = stitch.to_dict() | {"published": stitch.key in published}
            if stitch.key in self.importance:
                row["importance"] = self.importance[stitch.key]
            if stitch.key in self.visits:
                row["visits"] = self.visits[stitch.key]
            row["metrics"] = {name: values[stitch.key] for name, values in self.metrics.items() if stitch.key in values}
            rows.append(row)
        return rows

    def to_dict(self, space: StitchSpace, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """The content of `stitches.json`, for the stitches at hand (all of the space by default); a deciding metric that none of
        them has is left out. `palette_gain` is there for those who read the file, and worked out anew from it, of these stitches."""
        from .palette import palette_gains  # which reads tables

        wanted = None if keys is None else set(keys)
        rows = self.to_rows(s for s in space if wanted is None or s.key in wanted)
        kept = {row["key"] for row in rows}
        metrics = {name: {key: v for key, v in values.items() if key in kept} for name, values in self.metrics.items()}
        gains = palette_gains(
            space, replace(self, metrics={name: values for name, values in metrics.items() if values})
        )
        return {
            "palette_gain": {name: {by: _finite(gain) for by, gain in found.items()} for name, found in gains.items()},
            "alone": {key: dict(values) for key, values in self.alone.items()},
            "space_digest": space.digest,
            "metric": self.metric if any(self.metric in row["metrics"] for row in rows) else None,
            "interval_count": self.interval_count,
            "importance_score": self.importance_score,
            "stitches": rows,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "StitchTable":
        """Reads what `to_dict` wrote.

        Raises:
            ValueError: a field is missing.
        """
        try:
            rows = content["stitches"]
            for row in rows:
                _check_row(row)
            metrics: dict[str, dict[str, float]] = {}
            for row in rows:
                for name, value in row["metrics"].items():
                    metrics.setdefault(name, {})[row["key"]] = _number(name, value)
            importance = {row["key"]: _number("importance", row["importance"]) for row in rows if "importance" in row}
            visits = {row["key"]: _count("visits", row["visits"]) for row in rows if "visits" in row}
            if len({row["key"] for row in rows}) != len(rows):
                raise ValueError("a stitch stands in it twice")
            if content["metric"] not in (None, *metrics):
                raise ValueError(f"its metric {content['metric']!r} is none of those measured ({', '.join(metrics)})")
            for name in metrics:
                higher_is_better(name)
            score = content.get("importance_score")
            if not isinstance(score, (str, NoneType)):
                raise ValueError(f"importance_score is {score!r}: a name or null is needed")
            intervals = _count("interval_count", content["interval_count"], 1)
            alone = {
                str(key): {str(name): _number(name, value) for name, value in values.items()}
                for key, values in content.get("alone", {}).items()
            }
            return cls(metrics, importance, content["metric"], intervals, score, visits, alone)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"stitches.json is damaged: {type(error).__name__} {error}") from None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_row(row: Mapping[str, Any]) -> None:
    _count("stitch_id", row["stitch_id"])
    for name, kind in {"key": str, "params": int, "published": bool}.items():
        if type(row[name]) is not kind:
            raise ValueError(f"{name} of a stitch is {row[name]!r}: {kind.__name__} is needed")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}: a number is needed")
    return float(value)


def _count(name: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{name} is {value!r}: a whole number from {least} on, at most {MOST:,}, is needed")
    return value
