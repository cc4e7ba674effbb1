"""Alignment: stitching layers trained on unlabelled inputs, for anchors that least squares alone does not join."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from stitched_llama.space import Stitch

if TYPE_CHECKING:
    from .modeling_base import StitchedPreTrainedModel


def align(
    model: "StitchedPreTrainedModel",
    batches: Sequence[dict[str, Tensor]],
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Trains the stitching layers, and nothing else, so that each stitch says what the anchor of its tail says alone.

    Each step takes one batch and one stitch, drawn evenly, and lowers the Kullback-Leibler divergence of its output from that
    anchor's, all tokens alike. It needs no labels, so it serves every later task. AdamW, linear warm-up over a tenth, then
    cosine; layers train in float32. (The distance of the last features instead lifted a fifth as much: LOG.md.)

    Args:
        batches: as `calibrate` takes them.
        steps: optimiser steps; each costs a forward of the tail's anchor, and a forward and backward of the stitch.

    Raises:
        ValueError: a loss that is not finite.

    Of little use where the heads of image classifiers are new: what they say is noise.

    Source: a remedy of ours; in the papers least squares is all.
    """
    stitches = [model.space[key] for key in model.keys if model.space[key].layers]
    parameters = list(model.stitching_layers.parameters())
    before = [(parameter.dtype, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min((step + 1) / warm_up, 1.0)
            * 0.5
            * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        ),
    )
    rng = random.Random(seed)
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in tqdm(range(steps), desc="align", disable=not progress):
            stitch, batch = rng.choice(stitches), batches[step % len(batches)]
            batch = {name: batch[name].to(model.device) for name in model.calibration_inputs if name in batch}
            optimizer.zero_grad()
            with torch.enable_grad():
                own = [p for layer in stitch.layers for p in model.stitching_layers[layer].parameters()]
                loss = _divergence(model, stitch, batch)
                if not loss.isfinite():
                    raise ValueError(
                        f"step {step + 1} of the alignment: the loss of stitch {stitch.stitch_id} ({stitch.key}) is {loss.item()}: "
                        "look at that batch and the anchors, or leave the alignment out"
                    )
                loss.backward(inputs=own)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    finally:
        for parameter, (dtype, trains) in zip(parameters, before):
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(trains)
            parameter.grad = None


def _divergence(model: Any, stitch: Stitch, batch: dict[str, Tensor]) -> Tensor:
    anchor = model.space.anchor_stitch(stitch.segments[-1].anchor)
    with torch.no_grad():
        wanted = model.raw_logits(batch, anchor.key).float().log_softmax(-1)
    found = model.raw_logits(batch, stitch.key).float().log_softmax(-1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
