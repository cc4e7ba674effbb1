"""`stitched-llama space SMALL LARGE [MORE...]`: every stitch and its cost, without weights."""

import argparse
import json

from stitched_llama.space import (
    ADAPTER_NORMS,
    ADAPTERS,
    DIRECTIONS,
    KEYS,
    PAIRS,
    RESCALES,
    SPACE_OPTIONS,
    Precision,
    StitchSpace,
    format_bytes,
    format_count,
    parse_junctions,
)
from stitched_llama.space.cost import BYTES_PER_NUMBER


def add_parser(commands: argparse._SubParsersAction) -> None:
    does = "list the stitches of anchors and their costs, from their config.json alone"
    parser = commands.add_parser(
        "space",
        help=does,
        description=f"{does[0].upper()}{does[1:]}: one line a stitch, ascending in parameters; no weights are read.",
        epilog=KEYS,
    )
    parser.add_argument("anchors", nargs="+", metavar="ANCHOR", help="folders or Hub ids, small to large; two or more")
    parser.add_argument("--kernel-size", type=int, default=1, help="blocks of the sliding window (default 1)")
    parser.add_argument("--stride", type=int, default=1, help="stride of the sliding window (default 1)")
    parser.add_argument("--direction", choices=DIRECTIONS, default="fast-to-slow", help="direction of the routes")
    parser.add_argument("--pairs", choices=PAIRS, default="nearest", help="which anchors are joined")
    parser.add_argument("--adapter", choices=ADAPTERS, default="linear", help="kind of stitching layer, for images")
    parser.add_argument(
        "--rescale", choices=RESCALES, default="none", help="how stitching layers change the resolution"
    )
    parser.add_argument(
        "--adapter-norm", choices=ADAPTER_NORMS, default="none", help="norms before and after stitching layers"
    )
    parser.add_argument("--across-stages", action="store_true", help="also join stages of different resolution")
    parser.add_argument(
        "--junctions",
        nargs="+",
        metavar="SOURCE:TARGET",
        help="explicit junctions: 'aligned' for a small anchor made by shrink, or pairs of blocks such as 3:8 (from the output of block "
        "3 of the small anchor to the input of block 8 of the large one)",
    )
    parser.add_argument(
        "--routes", nargs="+", metavar="KEY", help="explicit stitches by key, such as 1[0:5]>0[3:5]>1[9:30]"
    )
    parser.add_argument(
        "--image-size", type=int, help="side of the images, for anchors that take any (DINOv2, ConvNeXt, ...)"
    )
    parser.add_argument("--dtype", choices=BYTES_PER_NUMBER, default="bfloat16", help="dtype of weights and KV cache")
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="quantisation of the blocks' linear layers")
    parser.add_argument("--context", type=int, default=0, help="tokens attended to, counted in MACs (default 0)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    space = StitchSpace.from_configs(
        options.anchors,
        options.image_size,
        **{name: getattr(options, name) for name in SPACE_OPTIONS if name != "junctions"},
        junctions=parse_junctions(options.junctions),
        precision=Precision(options.dtype, options.quantization, options.context),
    )
    if options.json:
        print(json.dumps([stitch.to_dict() for stitch in space], indent=2))
        return 0
    print(f"{'id':>3}  {'key':<28} {'params':>8} {'MACs/' + space.anchors[0].unit:>10} {'weights':>8} {'KV/token':>8}")
    for stitch in space:
        print(
            f"{stitch.stitch_id:>3}  {stitch.key:<28} {format_count(stitch.params):>8} "
            f"{format_count(stitch.macs):>10} {format_bytes(stitch.weight_bytes):>8} "
            f"{format_bytes(stitch.kv_bytes_per_token):>8}" + ("  anchor" if stitch.is_anchor else "")
        )
    layers = space.stitching_layers.values()
    print(
        f"{len(space)} stitches on {len(layers)} stitching layers of {format_count(sum(x.params for x in layers))} parameters"
    )
    return 0
