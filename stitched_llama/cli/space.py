"""`stitched-llama space SMALL LARGE [MORE...]`: every stitch and its cost, without weights."""

import argparse
import json
from dataclasses import MISSING, fields
from typing import Any

from stitched_llama.space import KEYS, Precision, SpaceArguments, StitchSpace, format_bytes, format_count
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
    for option in fields(SpaceArguments):
        name, how = f"--{option.name.replace('_', '-')}", dict[str, Any](help=option.metadata["help"])
        if option.default_factory is not MISSING:
            parser.add_argument(name, nargs="+", default=option.default_factory(), **how)
        elif option.default is False:
            parser.add_argument(name, action="store_true", **how)
        else:
            kind = int if isinstance(option.default, int) else str
            how["help"] += "" if option.default is None else f" (default: {option.default})"
            parser.add_argument(name, type=kind, default=option.default, **how)
    parser.add_argument(
        "--image-size", type=int, help="side of the images, for anchors that take any (DINOv2, ConvNeXt, ...)"
    )
    parser.add_argument("--dtype", choices=BYTES_PER_NUMBER, default="bfloat16", help="dtype of weights and KV cache")
    parser.add_argument("--quantization", choices=("8bit", "4bit"), help="quantisation of the blocks' linear layers")
    parser.add_argument("--context", type=int, default=0, help="tokens attended to, counted in MACs (default 0)")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    arguments = SpaceArguments(**{option.name: getattr(options, option.name) for option in fields(SpaceArguments)})
    if arguments.is_measured:
        raise ValueError(
            "junctions 'similar' and routes 'greedy' are measured by finetune, on weights; here none are read"
        )
    space = StitchSpace.from_configs(
        options.anchors,
        options.image_size,
        **arguments.options(),
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
