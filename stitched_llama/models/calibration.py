"""Calibration: every stitching layer by least squares, in one pass over a few batches of unlabelled text or images."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stitched_llama.layers import Fit, LeastSquares, Residual
from stitched_llama.space import Junction

from .alignment import align
from .first_rows import FirstRows, relative_weights
from .route import junction_rows

if TYPE_CHECKING:
    from .modeling_base import StitchedPreTrainedModel

_HELD_OUT_EVERY, _HELD_OUT_MOST = 8, 8
_R2_WARNING = 0.5
_OF_THE_FIT = f"on the rows of the fit: give {_HELD_OUT_EVERY} batches or more for held-out ones"


@dataclass(frozen=True)
class Calibration:
    """What calibration found, on batches that were kept out of the fit, or where there were too few on the first of the fit.

    Attributes:
        r2: junction -> R2 of the least-squares solution, the first token of each row (class tokens) left out; of text each row counts
            relative to its norm.
        r2_with_first: the same with the first token.
        loss: stitch key -> loss before any training, nats a token or image; the honest figure. Empty for images
            without labels.
        loss_unaligned: the same before the alignment stage; empty without one.
        unchanged: stitching layers whose solution made their stitches worse on these batches and was not taken.
        rows: tokens or places in the fit.
        held_out: False when fewer than eight batches came, so that the first serves both the fit and the report.
    """

    r2: dict[str, float] = field(default_factory=dict)
    r2_with_first: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    loss_unaligned: dict[str, float] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    rows: int = 0
    held_out: bool = True

    def __str__(self) -> str:
        lines = [] if self.held_out else [f"measured {_OF_THE_FIT}"]
        lines += [f"{'junction':<18} {'R2':>7} {'R2 with first token':>20}"]
        lines += [f"{name:<18} {value:7.3f} {self.r2_with_first[name]:20.3f}" for name, value in self.r2.items()]
        lines += [f"not taken, worse than what was there: {', '.join(self.unchanged)}"] if self.unchanged else []
        first = f" {'unaligned':>10}" if self.loss_unaligned else ""
        lines += ["", f"{'stitch':<24} {'loss before training':>20}{first}"] if self.loss else []
        for key, value in self.loss.items():
            unaligned = f" {self.loss_unaligned[key]:10.4f}" if self.loss_unaligned else ""
            lines.append(f"{key:<24} {value:20.4f}{unaligned}")
        return "\n".join(lines)


def _check_batch(model: Any, number: int, batch: Any) -> None:
    name = model.calibration_inputs[0]
    found = batch.get(name) if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping) or not isinstance(found, Tensor):
        raise ValueError(
            f"calibrate takes a list, or a loader, of dicts with {name} as a tensor: batch {number} "
            + (f"has {name} {type(found).__name__}" if isinstance(batch, Mapping) else f"is a {type(batch).__name__}")
        )


def calibrate(
    model: "StitchedPreTrainedModel",
    batches: Iterable[dict[str, Tensor]],
    ridge: float = 1e-4,
    shared: str = "joint",
    row_weights: str | None = None,
    align_steps: int = 0,
    align_rate: float = 1e-3,
    progress: bool = True,
) -> Calibration:
    """Fits every stitching layer to the activation that enters the tail, and reports what that is worth.

    The target of a junction into block b is the output of the large anchor's block b-1, its embedding for b = 0.
    Every eighth batch (eight at most) is kept out of the fit for the report; with fewer than eight it is of the first of the fit, and
    says so. Memory is O(width^2) a stitching layer.

    The sums stay where the tail's blocks lie: at 7B/13B with 32 stitching layers 9.7 GB of float64.

    Args:
        batches: dicts of `input_ids` and optionally `attention_mask`, [batch, tokens] each; or of `pixel_values`
            [batch, channels, height, width] and optionally `labels` [batch].
        ridge: relative to the mean variance of the head's features.
        shared: for a layer that serves several junctions, `"joint"` minimises the sum of their residuals, `"mean"`
            averages their separate solutions (SN-Net).
        row_weights: `"relative"`, every row's error counts relative to the norm of its target; or `"none"`. None is `"relative"` for
            text and `"none"` for images. With `"relative"` the first token of a row is fitted apart where its activation is massive:
            it is nearly one constant vector, hundreds of times the others', and the attention of all later tokens rests on
            it. It is mapped to its target's direction at eight times the norm of the others, which disturbs them little.
        align_steps, align_rate: then train the stitching layers for so many steps (see `alignment.align`); the batches of the
            fit are kept in memory for it.
        progress: show a progress bar.

    Raises:
        ValueError: no batch, PST is attached already, or an unknown option.

    Source: SN-Net section 3.2, ESTA section 4.1.
    """
    if shared not in ("joint", "mean"):
        raise ValueError(f"shared {shared!r} is unknown; 'joint' or 'mean' is needed")
    if row_weights is None:
        row_weights = "relative" if model.main_input_name == "input_ids" else "none"
    if row_weights not in ("none", "relative"):
        raise ValueError(f"row_weights {row_weights!r} is unknown; 'relative' or 'none' is needed")
    if align_steps < 0 or not align_rate > 0:
        raise ValueError(f"align_steps is {align_steps} and align_rate {align_rate}: 0 steps or more, a rate above 0")
    if model.config.pst is not None:
        raise ValueError("PST is attached: calibrate before attach_pst, so that LoRA starts from the fitted layers")
    junctions = [j for j in model.space.junctions if j.layer in model.stitching_layers]
    sums: dict[tuple[str, str], LeastSquares] = {}
    firsts: dict[tuple[str, str], FirstRows | None] = {}
    held_out, kept_batches, first_batch = [], [], None
    training, rows = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(tqdm(batches, desc="calibrate", disable=not progress)):
                _check_batch(model, number, batch)
                batch = {name: batch[name].to(model.device) for name in model.calibration_inputs if name in batch}
                first_batch = batch if first_batch is None else first_batch
                if number % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 and len(held_out) < _HELD_OUT_MOST:
                    held_out.append(batch)
                    continue
                if align_steps:
                    kept_batches.append(batch)
                most = 0
                for junction, x, y in _activations(model, junctions, batch):
                    x = model.stitching_layers[junction.layer].sampled(x)
                    kept, rest = model.row_masks(batch, junction, x)
                    most = max(most, int(kept.sum()))
                    name = (junction.layer, str(junction) if shared == "mean" else "")
                    if name not in sums:
                        sums[name] = LeastSquares(x.shape[-1], y.shape[-1], device=y.device)
                        if row_weights == "relative":
                            firsts[name] = FirstRows.of(y, kept, rest)
                    if firsts.get(name) is not None:
                        firsts[name].add(x, y, kept & ~rest)
                        kept = rest
                    x, y = x[kept.to(x.device)], y[kept.to(y.device)]
                    weights = relative_weights(y) if row_weights == "relative" else None
                    if model.stitching_layers[junction.layer].may_be_identity:
                        y = y - x.to(y)  # the ridge then draws towards the identity
                    sums[name].add(x, y, weights)
                rows += most
            if first_batch is None:
                raise ValueError(f"calibrate got no batches: pass dicts of {' and '.join(model.calibration_inputs)}")
            before = _losses_before(model, held_out or [first_batch], progress)
            kept_weights = {name: _core_weights(layer) for name, layer in model.stitching_layers.items()}
            _solve(model, sums, firsts, rows, ridge)
            sums.clear()  # they are large, and what follows needs memory too
            weighted = row_weights == "relative"
            report = _report(model, junctions, held_out or [first_batch], rows, bool(held_out), progress, weighted)
            if worse := _worse_layers(model, before, report.loss):
                for name in worse:
                    model.stitching_layers[name].set_core(*kept_weights[name])
                again = _report(model, junctions, held_out or [first_batch], rows, bool(held_out), progress, weighted)
                report = replace(report, loss=again.loss, unchanged=worse)
            if align_steps:
                align(model, kept_batches, align_steps, align_rate, progress=progress)
                fitted = report
                report = _report(model, junctions, held_out or [first_batch], rows, bool(held_out), progress, weighted)
                report = replace(report, loss_unaligned=fitted.loss)
    finally:
        model.train(training)
    if report.loss:
        model.table = model.table.with_metrics("loss_before", report.loss)
    _warn(report)
    return report


def _activations(model: Any, junctions: list[Junction], batch: dict[str, Tensor]):
    """Yields (junction, X, Y) with one forward of each anchor; X, Y: [batch, places, width]."""
    outputs = [model.block_outputs(index, **batch) for index in range(len(model.anchors))]
    families, specs = model.families, model.space.anchors
    for junction in junctions:
        x = junction_rows(families, specs, junction, outputs[junction.head].leaves[junction.head_stop - 1])
        y = junction_rows(families, specs, junction, outputs[junction.tail].enters[junction.tail_start], tail=True)
        yield junction, x, y


def _core_weights(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.core.weight.detach().clone(), layer.core.bias.detach().clone()


def _losses_before(model: Any, batches: list, progress: bool) -> dict[str, float]:
    """Loss of every stitch whose layers hold something better than random numbers: the identity, or an earlier fit."""
    keys = [
        key
        for key in model.keys
        if (layers := model.space[key].layers) and all(model.stitching_layers[name].is_initialised for name in layers)
    ]
    totals = {key: [0.0, 0] for key in keys}
    for batch in tqdm(batches, desc="before", disable=not progress or not keys):
        _add_losses(model, batch, totals)
    return {key: total / count for key, (total, count) in totals.items() if count}


def _worse_layers(model: Any, before: dict[str, float], after: dict[str, float]) -> tuple[str, ...]:
    """Stitching layers whose stitches lost on average."""
    changes: dict[str, list[float]] = {}
    for key in before.keys() & after.keys():
        for name in model.space[key].layers:
            changes.setdefault(name, []).append(after[key] - before[key])
    return tuple(sorted(name for name, change in changes.items() if not sum(change) <= 0))


def _add_losses(model: Any, batch: dict[str, Tensor], totals: dict[str, list]) -> None:
    for key, total in totals.items():
        loss, count = model.calibration_loss(batch, key)
        total[0] += loss * count
        total[1] += count


def _solve(
    model: Any,
    sums: dict[tuple[str, str], LeastSquares],
    firsts: Mapping[tuple[str, str], FirstRows | None],
    rows: int,
    ridge: float,
) -> None:
    solved: dict[str, list[Fit]] = {}
    for (layer, part), squares in sums.items():
        width, made = len(squares.x_sum), model.stitching_layers[layer]
        if rows <= width and layer not in solved:
            warnings.warn(
                f"{rows} rows for the {width} features of stitching layer {layer}: the ridge decides; give more batches",
                stacklevel=3,
            )
        fit = squares.solve(ridge)
        if made.may_be_identity:
            fit = replace(fit, weight=fit.weight + torch.eye(width).to(fit.weight))
        if (first := firsts.get((layer, part))) is not None:
            fit = squares.pinned(fit, first.x, first.target)
        solved.setdefault(layer, []).append(fit)
    for layer, fits in solved.items():
        mean = {field.name: torch.stack([getattr(fit, field.name) for fit in fits]).mean(0) for field in fields(Fit)}
        model.stitching_layers[layer].init_solution(Fit(**mean))


def _report(
    model: Any, junctions: list[Junction], batches: list, rows: int, held_out: bool, progress: bool, weighted: bool
) -> Calibration:
    with_first = {str(j): Residual() for j in junctions}
    without = {str(j): Residual() for j in junctions}
    totals = {key: [0.0, 0] for key in model.keys}
    for batch in tqdm(batches, desc="report", disable=not progress):
        for junction, x, y in _activations(model, junctions, batch):
            layer = model.stitching_layers[junction.layer]
            predicted = layer.as_trained(layer(x)).to(y.device)
            kept, rest = (mask.to(y.device) for mask in model.row_masks(batch, junction, predicted))
            for residual, mask in ((with_first, kept), (without, rest)):
                residual[str(junction)].add(predicted[mask], y[mask], relative_weights(y[mask]) if weighted else None)
        _add_losses(model, batch, totals)
    return Calibration(
        r2={name: residual.r2 for name, residual in without.items()},
        r2_with_first={name: residual.r2 for name, residual in with_first.items()},
        loss={key: total / count for key, (total, count) in totals.items() if count},
        rows=rows,
        held_out=held_out,
    )


def _warn(report: Calibration) -> None:
    poor = {name: value for name, value in report.r2.items() if not value >= _R2_WARNING}
    if poor:
        name, value = min(poor.items(), key=lambda item: item[1])
        warnings.warn(
            f"{len(poor)} of {len(report.r2)} junctions do not fit (R2 below {_R2_WARNING}), the worst is {name} with "
            f"{value:.2f}{'' if report.held_out else f' ({_OF_THE_FIT})'}: look at the loss of its stitches before you train for hours; "
            "anchors of one family, or aligned to each other, fit best",
            stacklevel=3,
        )
