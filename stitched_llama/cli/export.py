"""`stitched-llama export BUNDLE OUT --budget 9B`: one size with all its weights, for where people already work."""

import argparse

from stitched_llama.space import KEYS, format_count, printable


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "export",
        help="write one size of a bundle with all its weights",
        description="Writes one size of a bundle, with all its weights and what was trained merged into them, into a new folder. An "
        "anchor, and a stitch without stitching layers, becomes a plain model that Transformers loads without this package; any other "
        "becomes one that needs it, and no anchors.",
        epilog=KEYS,
    )
    parser.add_argument("bundle", help="folder or Hub id of a bundle")
    parser.add_argument("out", help="folder to write; a new one")
    parser.add_argument("--budget", help="which size, such as 9B, 12GB or '8 GMACs'")
    parser.add_argument("--stitch-id", help="which stitch, by id or key, instead of a budget")
    parser.add_argument(
        "--context", type=int, default=0, help="tokens for which a budget of memory must have room too (default 0)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="of the weights, such as bfloat16 (default: as the anchors have it)"
    )
    parser.add_argument("--plain", action="store_true", help="refuse a size that needs this package")
    parser.add_argument("--anchors", nargs="+", metavar="ANCHOR", help="where the anchors lie now, small to large")
    parser.add_argument("--no-verify", action="store_true", help="also where the bundle is not what was saved")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from transformers import AutoConfig
    from transformers.utils import logging

    import stitched_llama.models as models

    logging.disable_progress_bar()
    if (options.budget is None) == (options.stitch_id is None):
        raise ValueError("one of --budget and --stitch-id is needed: which size to write")
    kind = AutoConfig.from_pretrained(options.bundle, trust_remote_code=False).model_type
    if kind not in models.CLASSES:
        raise ValueError(f"{options.bundle} has the model_type {kind!r}; one of {', '.join(models.CLASSES)} is needed")
    model = models.CLASSES[kind].from_pretrained(
        options.bundle,
        stitch_id=options.stitch_id,
        budget=options.budget,
        context_tokens=options.context,
        anchors=options.anchors,
        dtype=options.dtype,
        verify=not options.no_verify,
    )
    done = model.export(options.out, plain=True if options.plain else None)
    size = f"{format_count(done.stitch.params)} parameters, stitch {done.stitch.stitch_id} ({done.stitch.key})"
    needs = "loads without this package" if done.not_plain is None else f"needs this package: {done.not_plain}"
    print(printable(f"{done.folder}: {size}, a {done.architecture}, which {needs}"))
    return 0
