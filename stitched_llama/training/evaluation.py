"""Loss and accuracy of every stitch on held-out rows or images."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stitched_llama.models.images import check_labels

from .checks import check_batch
from .data import IGNORED


@torch.no_grad()
def response_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, label count and exact match of each row: logits [batch, tokens, vocabulary], labels [batch, tokens].

    A row matches if the argmax at every labelled position, EOS included, is the label: the result of greedy decoding, computed
    without generating.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    wanted = labels != IGNORED
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels) | ~wanted
    return losses.sum(1), wanted.sum(1), right.all(1)


@torch.no_grad()
def image_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, 1, and whether the argmax is the label, for each image: logits [batch, classes], labels [batch].

    Raises:
        ValueError: a label outside the classes.
    """
    check_labels(labels, logits.shape[-1])
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return losses, torch.ones_like(losses), logits.argmax(-1) == labels


@torch.no_grad()
def evaluate_stitches(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    keys: Sequence[str] | None = None,
    progress: bool = True,
    rank: int = 0,
    world_size: int = 1,
    split: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """`{"loss": {key: nats}, "exact_match" or "accuracy": {key: share}}` of the stitches `keys` (default: all).

    Args:
        batches: dicts of input_ids, attention_mask, labels, [batch, tokens] each; or of pixel_values [batch, channels,
            height, width] and labels [batch]. They are iterated once for each stitch and once to find labels; an iterator is first
            collected in memory.
        split: compute the metrics on every second row, and on the other rows as `loss_test`, `exact_match_test` or
            `accuracy_test`, for stitches chosen by the former.
        autocast: dtype of matrix products, as in mixed-precision training; logits are scored in float32.
        rank, world_size: each rank takes every `world_size`-th stitch; all ranks get all results.

    Raises:
        ValueError: there are no batches, no labels in them, or a loss that is not finite.
    """
    batches = list(batches) if isinstance(batches, Iterator) else batches
    if not any("labels" in batch and (batch["labels"] != IGNORED).any() for batch in batches):
        raise ValueError("no labels to evaluate on: the held-out part is empty")
    keys = list(model.keys if keys is None else keys)
    training = model.training
    model.eval()
    found = {}
    for key in tqdm(keys[rank::world_size], desc="evaluate stitches", disable=not progress or rank != 0):
        found[key] = _evaluate(model, batches, split, autocast, stitch_id=key)
    model.train(training)
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, found)
        found = {key: value for part in gathered for key, value in part.items()}
    return {name: {key: found[key][name] for key in keys} for name in found[keys[0]]} if keys else {}


@torch.no_grad()
def evaluate_plain(
    model: Any, batches: Iterable[dict[str, Tensor]], split: bool = False, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """Loss and exact match or accuracy of a plain model of Transformers, named as in `evaluate_stitches`.

    Raises:
        ValueError: there are no labels, or with `split` fewer than two rows.
    """
    model.eval()
    return _evaluate(model, batches, split, autocast)


def _evaluate(
    model: Any, batches: Iterable[dict[str, Tensor]], split: bool, autocast: torch.dtype | None, **route: Any
) -> dict[str, float]:
    images, rows = model.main_input_name == "pixel_values", 0
    totals = torch.zeros(2, 4, dtype=torch.float64)  # of even and odd rows: loss, labels, correct rows, rows
    name = f"stitch {route['stitch_id']}" if route else "the model"
    for batch in batches:
        check_batch(batch, images)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels").long()
        with torch.autocast(labels.device.type, autocast, enabled=autocast is not None):
            logits = model(**batch, **route, **({} if images else {"use_cache": False})).logits
        scores = (image_scores if images else response_scores)(logits, labels.to(logits.device))
        if not (finite := scores[0].isfinite()).all():
            row = int(finite.logical_not().nonzero()[0])
            raise ValueError(
                f"{name} has the loss {float(scores[0][row])} on row {rows + row} of those it is evaluated on: its weights or that "
                "row are damaged, or the dtype is too narrow"
            )
        values = torch.stack(
            [*(score.double().cpu() for score in scores), torch.ones(len(labels), dtype=torch.float64)], 1
        )
        for parity in (0, 1):
            totals[parity] += values[(rows + parity) % 2 :: 2].sum(0)
        rows += len(labels)
    if split and rows < 2:
        raise ValueError(f"{rows} held-out row: two or more are needed, as half of them choose and half of them test")
    metric = "accuracy" if images else "exact_match"
    parts = {"": totals[0], "_test": totals[1]} if split else {"": totals.sum(0)}
    values = {}
    for end, (loss, labels, matches, count) in parts.items():
        values |= {f"loss{end}": float(loss / labels), f"{metric}{end}": float(matches / count)}
    return values


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN if one side is constant or contains a NaN."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan
    return float(spearmanr(first, second).statistic)
