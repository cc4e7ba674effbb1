"""`stitched-llama bundle show|verify|digest PATH`: list the content of a bundle, check its integrity, record digests after an edit."""

import argparse
import json

from stitched_llama.space import KEYS, format_bytes, format_count, printable


def add_parser(commands: argparse._SubParsersAction) -> None:
    does = "show the content of a bundle, or verify its integrity"
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
    show.add_argument("--json", action="store_true", help="print stitches.json")
    show.add_argument("--no-verify", action="store_true", help="also if config or table differ from their digests")
    show.set_defaults(run=run_show)
    checks = "files as saved, tables consistent, anchors unchanged, every tensor there"
    verify = actions.add_parser("verify", help=checks, description=f"Checks a bundle: {checks}.")
    verify.add_argument("path", help="folder of a bundle")
    verify.add_argument("--no-anchors", action="store_true", help="do not load the anchors it was trained on")
    verify.add_argument(
        "--anchors", nargs="+", metavar="ANCHOR", help="current paths or Hub ids of the anchors, small to large"
    )
    verify.set_defaults(run=run_verify)
    digest = actions.add_parser(
        "digest", help="record digests of the current files, for a bundle that was edited on purpose or has none"
    )
    digest.add_argument("path", help="folder of a bundle that you trust")
    digest.set_defaults(run=run_digest)


def run_show(options: argparse.Namespace) -> int:
    from stitched_llama.bundles import WEIGHTS, Bundle
    from stitched_llama.space import StitchTable

    bundle = Bundle.open(options.path, verify=not options.no_verify, weights=False)
    table, rows = StitchTable.from_dict(bundle.table), bundle.table["stitches"]
    if options.json:
        print(json.dumps(bundle.table, indent=2))
        return 0
    for index, anchor in enumerate(bundle.config.get("anchors") or []):
        at = f" at {anchor['revision']}" if anchor["revision"] else ""
        print(printable(f"anchor {index}: {anchor['name_or_path']}{at}"))
    if not bundle.config.get("anchors"):
        print("the weights of its anchors are in it")
    size = (bundle.folder / WEIGHTS).stat().st_size
    print(f"{len(bundle.shapes)} tensors, {format_bytes(size)}; PST: {json.dumps(bundle.config.get('pst'))}")
    names = sorted(table.metrics)
    print(f"{'id':>3}  {'key':<28} {'params':>8} " + " ".join(f"{name:>18}" for name in names) + "  published")
    for row in rows:
        values = " ".join(f"{table.metrics[name].get(row['key'], float('nan')):18.4f}" for name in names)
        mark = "yes" if row["published"] else ""
        print(printable(f"{row['stitch_id']:>3}  {row['key']:<28} {format_count(row['params']):>8} {values}  {mark}"))
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from stitched_llama.bundles import Bundle
    from stitched_llama.models import CLASSES

    bundle = Bundle.open(options.path)
    bundle.load_tensors(bundle.shapes)  # raises if a value is not finite
    kind = bundle.config.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{options.path} has the model_type {kind!r}; one of {', '.join(CLASSES)} is needed")
    CLASSES[kind].check_tables(bundle)
    print(printable(f"{options.path}: files as saved, {len(bundle.shapes)} tensors, all finite, tables consistent"))
    if options.no_anchors:
        return 0
    model = CLASSES[kind].from_pretrained(options.path, anchors=options.anchors, verify="full")
    print(printable(f"{options.path}: anchors unchanged, read whole; all tensors of {len(model.keys)} stitches there"))
    return 0


def run_digest(options: argparse.Namespace) -> int:
    from stitched_llama.bundles import DIGESTS, Bundle, recorded_files, write_digests

    bundle = Bundle.open(options.path, verify=False)
    names = recorded_files(bundle.folder)
    (bundle.folder / DIGESTS).unlink(missing_ok=True)
    write_digests(bundle.folder, names)
    print(printable(f"{options.path}: recorded {', '.join(names)} as they are"))
    return 0
