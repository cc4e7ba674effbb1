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


def model_card(anchors: list[dict] | None, space: StitchSpace, stitches: list[Stitch], table: StitchTable) -> str:
    """Markdown with Hub metadata: which anchors are needed (None where their weights are in the bundle), which sizes are published,
    how to load one."""
    whole, anchors = not anchors, anchors or [{}] * len(space.anchors)
    names = [anchor.get("name_or_path") or "an unnamed model" for anchor in anchors]
    hub_ids = [
        name for name in names if name.count("/") == 1 and not name.startswith((".", "/")) and not Path(name).exists()
    ]
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
            what, "",
            "```python", "import stitched_llama  # registers the classes",
            *((_IMAGE_USE if images else _TEXT_USE).format(budget=budget).splitlines()), "```", "",
            "## Published sizes", "", "A budget chooses among these; every stitch stays reachable by `stitch_id`.", "",
            *rows, "", *told, *([""] if told else []),
        ]
    )  # fmt: skip
