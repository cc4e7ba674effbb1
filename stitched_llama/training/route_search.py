"""Options of a space found by measurement: routes or junctions of low loss before training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stitched_llama.models import StitchedLlamaForCausalLM, propose_junctions
from stitched_llama.models.loading import load_plain
from stitched_llama.space import Segment, SpaceArguments, anchor_specs, replaced_blocks, route_key

from .evaluation import evaluate_stitches


@dataclass(frozen=True)
class RouteProposal:
    """Routes found by `propose_routes`.

    Attributes:
        routes: keys, ascending in parameters, for the option `routes` of a space.
        loss: key -> loss before training, nats a label, of those.
    """

    routes: list[str]
    loss: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.routes))
        lines = [f"{key:<{width}} {self.loss[key]:20.4f}" for key in self.routes]
        return "\n".join([f"{'route':<{width}} {'loss before training':>20}", *lines])


def exchanged_route(groups: Sequence[range], from_large: Sequence[bool]) -> str:
    """Key of the route that runs group `i` of blocks of the large anchor (1) if `from_large[i]`, else block `i` of the small one."""
    segments: list[Segment] = []
    for index, (blocks, large) in enumerate(zip(groups, from_large, strict=True)):
        segment = Segment(1, blocks.start, blocks.stop) if large else Segment(0, index, index + 1)
        if segments and segments[-1].anchor == segment.anchor:
            segments[-1] = Segment(segment.anchor, segments[-1].start, segment.stop)
        else:
            segments.append(segment)
    return route_key(segments)


def propose_routes(
    model_class: Any,
    anchors: Sequence[Any],
    batches: Iterable[dict[str, Tensor]],
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> RouteProposal:
    """For each size between a model and the small one shrunk from it, a route of low loss, found greedily.

    Starting from the small anchor, each step replaces the block whose group of large blocks lowers the loss most, until half of
    them are replaced. Starting from the large anchor, each step replaces the group whose small block raises the loss least, down
    to half. For `n` groups about 3 n^2 / 4 evaluations.

    Args:
        model_class: the stitched class of the anchors.
        anchors: two loaded models of equal width, the first made from the second by `shrink`.
        batches: dicts of input_ids, attention_mask, labels, [batch, tokens] each; other rows than those reported on.
        autocast: dtype of matrix products, as in `evaluate_stitches`.

    Raises:
        ValueError: other anchors, or no labels.

    Source: the order of patches in KLPatch (arXiv 2607.08170); the measure here is the loss.
    """
    configs = [anchor.config.to_dict() for anchor in anchors]
    groups = replaced_blocks(configs, anchor_specs(configs))
    batches, free = list(batches), [index for index, blocks in enumerate(groups) if len(blocks) > 1]
    steps = {True: len(free) // 2, False: (len(free) - 1) // 2}  # upwards, downwards
    found: dict[str, float] = {}
    with tqdm(total=sum(len(free) - step for n in steps.values() for step in range(n)), disable=not progress) as bar:
        bar.set_description("search routes")
        for upwards, count in steps.items():
            pattern = [not upwards] * len(groups)
            for _ in range(count):
                tried = {}
                for index in (i for i in free if pattern[i] != upwards):
                    tried[exchanged_route(groups, [*pattern[:index], upwards, *pattern[index + 1 :]])] = index
                model = model_class.from_anchors(anchors, routes=list(tried), adapter="identity")
                loss = evaluate_stitches(model, batches, list(tried), progress=False, autocast=autocast)["loss"]
                best = min(loss, key=loss.__getitem__)
                found[best] = loss[best]
                pattern[tried[best]] = upwards
                bar.update(len(tried))
    if not found:
        raise ValueError(f"{len(groups)} blocks replace {configs[1]['num_hidden_layers']}: no size lies between")
    space = model_class.config_class.from_anchor_configs(configs, routes=list(found), adapter="identity").stitch_space()
    return RouteProposal([stitch.key for stitch in space if stitch.key in found], found)


def measured_options(
    options: SpaceArguments,
    names: Sequence[str],
    batches: Iterable[dict[str, Tensor]],
    band: int = 2,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Options of `StitchSpace` for `--junctions similar` or `--routes greedy` between two decoders; empty for neither.

    The anchors are loaded in float32 for the measurement and then freed; the result is printed if `progress`. All ranks use the result of the first.

    Raises:
        ValueError: an anchor cannot be loaded, or a loss is not finite.
    """
    if not options.is_measured:
        return {}
    greedy = options.routes == ["greedy"]
    anchors = [load_plain(name, dtype=torch.float32) for name in names]
    if greedy:
        proposal = propose_routes(StitchedLlamaForCausalLM, anchors, batches, autocast, progress)
        found = {"routes": proposal.routes, "junctions": None, "adapter": "identity"}
    else:
        proposal = propose_junctions(StitchedLlamaForCausalLM, anchors, batches, band, progress=progress)
        found = {"junctions": proposal.junctions, "adapter": proposal.adapter}
    if progress:
        print(proposal)
    if torch.distributed.is_initialized():  # last digits may differ between ranks, and the space must not
        shared = [found]
        torch.distributed.broadcast_object_list(shared)
        found = shared[0]
    return found
