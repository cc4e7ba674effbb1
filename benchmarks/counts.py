"""The papers' published counts beside ours, from configurations alone: nothing is loaded or run.

    python benchmarks/counts.py

Peer: the figures printed in the papers (rounded there; FLOPs there are multiply-accumulates). "ours" is exact arithmetic.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

from stitched_llama import PSTConfig, StitchSpace
from stitched_llama.training import dump_record, provenance

LABELS = {"id2label": {str(number): "" for number in range(1000)}}


def vit(width: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return {"model_type": "vit", "image_size": 224, **shape, **LABELS}


def llama(width: int, depth: int, units: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": depth, "intermediate_size": units}
    return {"model_type": "llama", "vocab_size": 32000, **shape}


def resnet(kind: str, widths: list[int], depths: list[int]) -> dict[str, Any]:
    return {"model_type": "resnet", "layer_type": kind, "hidden_sizes": widths, "depths": depths, **LABELS}


def rows() -> Iterator[tuple[str, str, float, float, str]]:
    """(source, what, published, ours, reason of a difference)."""
    configs = [vit(width) for width in (192, 384, 768)]
    space = StitchSpace.from_configs(configs, kernel_size=2)
    layers = sum(layer.params for layer in space.stitching_layers.values())
    everything = layers + sum(anchor.params for anchor in space.anchors)
    counts = PSTConfig(rank=(32, 16, 8)).trainable_params(space)
    anchors_bias = sum(4 * anchor.width * anchor.depth for anchor in space.anchors)
    fused = sum(
        rank * (4 * anchor.width + 2 * anchor.width) * anchor.depth for rank, anchor in zip((32, 16, 8), space.anchors)
    )
    routes_bias = counts["stitch_bias"] - anchors_bias
    heads = sum(200 * anchor.width + 200 for anchor in space.anchors)
    esta = fused + counts["stitching_layers"] + routes_bias + heads
    yield (
        "ESTA Table 1",
        "SN-Net on ViT-Ti/S/B, all trained: M parameters",
        124.2,
        (everything - 800 * (192 + 384 + 768 + 3)) / 1e6,
        "200 classes; 124.2 unexplained",
    )
    yield "SN-Net 4.1", "DeiT-Ti/S/B, kernel 2, stride 1: stitches", 71, len(space), ""
    yield "SN-Net Table 1", "DeiT-Ti/S/B with all stitching layers, M parameters", 118.4, everything / 1e6, ""
    chained = StitchSpace.from_configs(configs, kernel_size=2, pairs="chain")
    yield "SN-Net 4.2", "any pair and Ti-S-B: stitches", 732, len(chained), ""
    per_blocks = {tuple(_blocks(stitch)): stitch for stitch in space}
    table = (
        (12, 0, 0, 1.3, 5.7), (9, 3, 0, 2.1, 10.0), (6, 6, 0, 2.9, 14.0), (3, 9, 0, 3.8, 18.0), (0, 12, 0, 4.6, 22.1),
        (0, 9, 3, 7.9, 38.7), (0, 6, 6, 11.2, 54.6), (0, 3, 9, 14.3, 70.6), (0, 0, 12, 17.6, 86.6),
    )  # fmt: skip
    for *blocks, macs, params in table:
        stitch, name = per_blocks[tuple(blocks)], "/".join(map(str, blocks))
        rounded = "printed to one digit" if abs(stitch.macs / 1e9 / macs - 1) > 0.02 else ""
        yield "SN-Net Table 1", f"{name} blocks of Ti/S/B: G multiply-accumulates", macs, stitch.macs / 1e9, rounded
        yield "SN-Net Table 1", f"{name} blocks of Ti/S/B: M parameters", params, stitch.params / 1e6, ""
    yield (
        "ESTA Table 1",
        "ViT-Ti/S/B: M trained parameters",
        4.6,
        esta / 1e6,
        ("fused q, k, v; biases of the 68 routes; heads of 200 classes, as CUB has"),
    )
    ours = sum(counts.values()) / 1e6
    yield (
        "ESTA Table 1",
        "the same as this package trains it",
        4.6,
        ours,
        "q, k, v apart; biases of the 3 anchors too; no heads",
    )
    saved = (layers - counts["stitching_layers"]) / 1e6
    yield (
        "ESTA 5.3",
        "M trained parameters saved by low-rank stitching layers",
        2.4,
        saved,
        "4.07 - 1.52; 2.4 unexplained",
    )
    yield (
        "ESTA 5.3",
        "M trained parameters of the biases",
        1.4,
        routes_bias / 1e6,
        "q, k, v, o of every block of 68 routes; 1.4 unexplained",
    )
    pair = StitchSpace.from_configs([llama(4096, 32, 11008), llama(5120, 40, 13824)])
    yield "ESTA 5.2", "LLaMA-7B/13B: stitches", 40, len(pair), "39 routes and 2 anchors; the paper counts one anchor"
    for key, published in (
        ("0[0:31]>1[39:40]", 6.9), ("0[0:26]>1[33:40]", 7.8), ("0[0:8]>1[10:40]", 11.5), ("0[0:2]>1[3:40]", 12.5),
        ("1[0:40]", 13.0),
    ):  # fmt: skip
        yield "ESTA Table 2", f"{key}: B parameters", published, pair[key].params / 1e9, ""
    basic, deep = (
        resnet("basic", [64, 128, 256, 512], [2, 2, 2, 2]),
        resnet("bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3]),
    )
    residual = StitchSpace.from_configs([basic, deep])
    for index, (name, published) in enumerate((("ResNet-18", 1.81), ("ResNet-50", 4.09))):
        yield (
            "Traft, Cheney Table 1",
            f"{name}: G multiply-accumulates",
            published,
            residual.anchor_stitch(index).macs / 1e9,
            "",
        )

    swins = StitchSpace.from_configs(
        [
            {
                "model_type": "swin",
                "image_size": 224,
                "embed_dim": width,
                "depths": depths,
                "num_heads": heads,
                **LABELS,
            }
            for width, depths, heads in (
                (96, [2, 2, 6, 2], [3, 6, 12, 24]),
                (96, [2, 2, 18, 2], [3, 6, 12, 24]),
                (128, [2, 2, 18, 2], [4, 8, 16, 32]),
            )
        ]
    )
    for index, published in ((1, 8.7), (2, 15.4)):
        macs = swins.anchor_stitch(index).macs / 1e9
        yield "SN-Net 4.1", f"Swin-{'TSB'[index]}: G multiply-accumulates", published, macs, ""
    gaps = StitchSpace.from_configs([deep, deep], across_stages=True, adapter="bottleneck", rescale="bilinear")
    for key, stages, published in (("0[0:3]>1[4:16]", "1 to 2", 3.58), ("0[0:3]>1[14:16]", "1 to 4", 1.67)):
        what = f"ResNet-50, stage {stages}, downsampled, bottleneck: G multiply-accumulates"
        yield "Traft, Cheney Table 1", what, published, gaps[key].macs / 1e9, "blocks and inner width are not published"
    exploding = StitchSpace.from_configs([deep, deep], across_stages=True, adapter="bottleneck")["0[0:3]>1[14:16]"]
    what = "the same stage 1 to 4, not downsampled, times ResNet-50"
    reason = "published: out of memory (figure 2), above the whole model (figure 3)"
    yield "Traft, Cheney 3", what, math.nan, exploding.macs / gaps.anchor_stitch(0).macs, reason


def _blocks(stitch: Any) -> Iterator[int]:
    for anchor in range(3):
        yield sum(len(segment) for segment in stitch.segments if segment.anchor == anchor)


def main() -> None:
    found = [dict(zip(("source", "what", "published", "ours", "reason"), row)) for row in rows()]
    print(f"{'source':<22} {'what':<70} {'published':>9} {'ours':>9} {'differ':>7}  reason")
    for row in found:
        row["difference"] = row["ours"] / row["published"] - 1
        published, differ = (
            ("-", "") if math.isnan(row["published"]) else (f"{row['published']:g}", f"{row['difference']:.1%}")
        )
        print(f"{row['source']:<22} {row['what']:<70} {published:>9} {row['ours']:9.4g} {differ:>7}  {row['reason']}")
    record = provenance() | {"peer": "the papers' printed figures", "rows": found}
    print(json.dumps(json.loads(dump_record(record))))


if __name__ == "__main__":
    main()
