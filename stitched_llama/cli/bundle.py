"""`stitched-llama bundle show|verify PATH`: what a bundle holds, and whether it is whole."""

import argparse
import json

from stitched_llama.space import KEYS, format_bytes, format_count


def add_parser(commands: argparse._SubParsersAction) -> None:
    does = "show what a bundle holds, or verify that it is whole"
    parser = commands.add_parser("bundle", help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=KEYS)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="anchors, sizes, metrics",
        description="Lists the anchors a bundle was trained on and its stitches, with parameters, metrics and whether a budget "
        "may choose them; nothing is loaded.",
        epilog=KEYS,
    )
    show.add_argument("path", help="folder of a bundle")
    show.add_argument("--json", action="store_true", help="stitches.json as it is")
    show.set_defaults(run=run_show)
    checks = "files whole, digests right, anchors unchanged, every tensor there"
    verify = actions.add_parser("verify", help=checks, description=f"Checks a bundle: {checks}.")
    verify.add_argument("path", help="folder of a bundle")
    verify.add_argument("--no-anchors", action="store_true", help="do not load the anchors it was trained on")
    verify.add_argument("--anchors", nargs="+", metavar="ANCHOR", help="where the anchors lie now, small to large")
    verify.set_defaults(run=run_verify)


def run_show(options: argparse.Namespace) -> int:
    from stitched_llama.bundles import WEIGHTS, Bundle

    bundle = Bundle.open(options.path)
    rows = bundle.table["stitches"]
    if options.json:
        print(json.dumps(bundle.table, indent=2))
        return 0
    for index, anchor in enumerate(bundle.config["anchors"] or []):
        print(f"anchor {index}: {anchor['name_or_path']}" + (f" at {anchor['revision']}" if anchor["revision"] else ""))
    size = (bundle.folder / WEIGHTS).stat().st_size
    print(f"{len(bundle.shapes)} tensors, {format_bytes(size)}; PST: {json.dumps(bundle.config.get('pst'))}")
    names = sorted({name for row in rows for name in row["metrics"]})
    print(f"{'id':>3}  {'key':<28} {'params':>8} " + " ".join(f"{name:>18}" for name in names) + "  published")
    for row in rows:
        values = " ".join(f"{row['metrics'].get(name, float('nan')):18.4f}" for name in names)
        mark = "yes" if row["published"] else ""
        print(f"{row['stitch_id']:>3}  {row['key']:<28} {format_count(row['params']):>8} {values}  {mark}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from stitched_llama.bundles import Bundle

    bundle = Bundle.open(options.path)
    bundle.verify_weights()
    print(f"{options.path}: files whole, {len(bundle.shapes)} tensors, digests right")
    if not options.no_anchors:
        from stitched_llama.models import CLASSES

        kind = bundle.config.get("model_type")
        if kind not in CLASSES:
            raise ValueError(f"{options.path} has the model_type {kind!r}; one of {', '.join(CLASSES)} is needed")
        model = CLASSES[kind].from_pretrained(options.path, anchors=options.anchors)
        print(f"{options.path}: anchors unchanged, all tensors of {len(model.keys)} stitches there")
    return 0
