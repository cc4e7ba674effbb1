"""The model card of a bundle, from its table."""

from math import isfinite
from pathlib import Path

from stitched_llama.space import Stitch, StitchSpace, StitchTable, format_bytes, format_count, palette_gains

_TEXT_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/bundle")
tokenizer = AutoTokenizer.from_pretrained("this/bundle")
model.generate(**tokenizer("Hello", return_tensors="pt"), budget="{budget}")"""
_IMAGE_USE = """\
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("this/bundle", budget="{budget}")
processor = AutoImageProcessor.from_pretrained("this/bundle")
model(**processor(image, return_tensors="pt")).logits"""


def model_card(
    anchors: list[dict] | None, space: StitchSpace, stitches: list[Stitch], table: StitchTable, note: str | None = None
) -> str:
    """Markdown with Hub metadata: which anchors are needed (None where their weights are in the bundle), which sizes are published,
    how to load one."""
    whole, anchors = not anchors, anchors or [{}] * len(space.anchors)
    names = [anchor.get("name_or_path") or "an unnamed model" for anchor in anchors]
    hub_ids = _hub_ids(names)
    images = stitches[0].unit == "image"
    task = "image-classification" if images else "text-generation"
    head = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- stitched-llama"]
    if hub_ids:
        head += ["base_model:", *(f"- {name}" for name in hub_ids), "base_model_relation: adapter"]
    published = table.published(stitches)
    metrics = [table.metric] if table.metric else []
    rows = [f"| stitch_id | key | parameters | bfloat16 weights | {' | '.join(metrics)}{' |' if metrics else ''}"]
    rows.append("| --- " * (4 + len(metrics)) + "|")
    for stitch in stitches:
        if stitch.key in published:
            values = [f"{table.metrics[name].get(stitch.key, float('nan')):.4f} |" for name in metrics]
            size = format_bytes(2 * stitch.params)
            rows.append(
                f"| {stitch.stitch_id} | `{stitch.key}` | {format_count(stitch.params)} | {size} | {' '.join(values)}"
            )
    gains = palette_gains(space, table)
    told = [
        f"Palette gain by {name}: {found['params']:.2f} over parameters, {found['macs']:.2f} over multiply-accumulates (0: no better "
        "than the small anchor alone; 0.5: a straight line between the anchors)."
        for name, found in gains.items()
        if name == table.metric and isfinite(found["params"])
    ]
    what = f"{len(stitches)} sizes between {len(anchors)} models, with all their weights."
    if not whole:
        what = (
            f"{len(stitches)} sizes between {' and '.join(f'`{name}`' for name in names)}, trained at once by parameter-efficient "
            "stitch fine-tuning. The anchors' weights are not in it: they are loaded from where they were published."
        )
    middle = published[len(published) // 2]
    budget = format_count(next(stitch.params for stitch in stitches if stitch.key == middle))
    return "\n".join(
        [
            *head, "---", "", "# Stitched LLaMA bundle", "",
            what, "", *([note, ""] if note else []),
            "```python", "import stitched_llama  # registers the classes",
            *((_IMAGE_USE if images else _TEXT_USE).format(budget=budget).splitlines()), "```", "",
            "## Published sizes", "", "A budget chooses among these; every stitch stays reachable by `stitch_id`.", "",
            *rows, "", *told, *([""] if told else []),
        ]
    )  # fmt: skip


def exported_card(
    stitch: Stitch, table: StitchTable, anchors: list[str | None], source: str, architecture: str, not_plain: str | None
) -> str:
    """Markdown with Hub metadata of one size that was exported: where it came from, what loads it.

    Args:
        anchors: names of the anchors, none where they are not known.
        source: the bundle it was exported from, or an empty text.
        not_plain: why it needs this package; None where it does not.
    """
    used = {segment.anchor for segment in stitch.segments}
    hub_ids = _hub_ids([name for index, name in enumerate(anchors) if name and index in used])
    auto = "AutoModelForCausalLM" if stitch.unit == "token" else "AutoModelForImageClassification"
    task = "text-generation" if stitch.unit == "token" else "image-classification"
    head = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", "- stitched-llama"]
    if hub_ids:
        head += ["base_model:", *(f"- {name}" for name in hub_ids)]
        head += [f"base_model_relation: {'finetune' if stitch.is_anchor else 'merge'}"]
    places = [
        f"anchor {i} is {f'`{name}`' if name else 'an unnamed model'}" for i, name in enumerate(anchors) if i in used
    ]
    measured = {
        name: values[stitch.key]
        for name, values in sorted(table.metrics.items())
        if stitch.key in values and not name.endswith("_before")
    }
    load = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("this/folder"{{}})']
    if not_plain is None:
        runs = (
            f"A plain `{architecture}`, its weights merged: Transformers loads it without `stitched_llama`. Other runtimes that read "
            "this architecture with biases on q, k, v and o should take it as well; none was tried with this one."
        )
        load[-1] = load[-1].format("")
    else:
        runs = (
            f"A `{architecture}` of one size, with all weights of its route: it needs the package `stitched-llama` and no anchors. With "
            "`trust_remote_code=True` the file `stitched_code.py` imports that package where it is installed; after "
            f"`import stitched_llama` the classes are known without. It is no plain model: {not_plain}."
        )
        load[-1] = load[-1].format(", trust_remote_code=True")
    return "\n".join(
        [
            *head, "---", "", f"# {format_count(stitch.params)} parameters of a stitched model", "",
            f"Stitch {stitch.stitch_id}, `{stitch.key}`, {format_count(stitch.params)} parameters, exported"
            + (f" from `{source}`" if source else "") + (f"; {', '.join(places)}." if places else "."), "",
            runs, "", "```python", *load, "```", "",
            *(["Measured on the stitch: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()) + ".", ""] if measured else []),
        ]
    )  # fmt: skip


def _hub_ids(names: list[str]) -> list[str]:
    return [
        name for name in names if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    ]
