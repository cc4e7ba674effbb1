"""Saves a shrunk model as a plain Transformers folder with a model card."""

from pathlib import Path
from typing import Any

from stitched_llama.bundles import check_finite, staged_files

from .distillation import ShrinkDistillation

_CARD = """\
---
library_name: transformers
{base}tags:
- stitched-llama
---

# {depth} blocks cut out of {source}

{depth} of {large_depth} blocks{width}, distilled for {tokens} tokens so that the two can be stitched: block i reproduces the output of block
`target_blocks[i]` of the model it was cut from ({targets}). `config.json` says so in `shrunk_from`.{shared}

```python
from stitched_llama import StitchedLlamaForCausalLM

model = StitchedLlamaForCausalLM.from_anchors(["this/folder", "{source}"], junctions="aligned")
```

It is a plain model as well: `AutoModel` classes load it without `stitched_llama`.
"""


def save_shrunk(
    model: ShrinkDistillation, folder: str | Path, source: str, revision: str | None = None, tokens: int | None = None
) -> None:
    """Saves the student; its `config.json` gets `shrunk_from`: the model it was cut from, its depth, `target_blocks`, and which
    parts are the same tensors (`shared`). An interrupted save changes nothing.

    Args:
        source: folder or Hub id of the model it was cut from.
        tokens: seen in distillation, for the card.

    Raises:
        ValueError: a weight is not finite, or `folder` is that of the model it was cut from.
    """
    check_folder(folder, source)
    student, teacher = model.student, model.teacher
    check_finite(student.state_dict(), "the small model")
    shared = []
    if model.is_text and not student.get_input_embeddings().weight.requires_grad:
        shared = ["embedding", "head"]
    name = Path(source).name if Path(source).is_dir() else source
    student.config.shrunk_from = {
        "name_or_path": name,
        "revision": revision,
        "depth": teacher.config.num_hidden_layers,
        "target_blocks": model.target_blocks,
        "shared": shared,
    }
    student.config.use_cache = True  # Trainer switched it off
    fields: dict[str, Any] = {
        "source": name,
        "base": "" if Path(source).is_dir() else f"base_model: {name}\n",
        "depth": student.config.num_hidden_layers,
        "large_depth": teacher.config.num_hidden_layers,
        "width": "" if model.projections is None else f", {student.config.hidden_size} wide",
        "tokens": "an unknown number of" if tokens is None else f"{tokens:,}",
        "targets": ", ".join(map(str, model.target_blocks)),
        "shared": " Embedding and head are those of that model, unchanged." if shared else "",
    }
    with staged_files(folder) as stage:
        student.save_pretrained(stage)
        (stage / "README.md").write_text(_CARD.format(**fields), encoding="utf-8")


def check_folder(folder: str | Path, source: str) -> None:
    """Refuses to save a small model over the one it is cut from.

    Raises:
        ValueError: both are one folder.
    """
    if Path(source).is_dir() and Path(source).resolve() == Path(folder).resolve():
        raise ValueError(
            f"{folder} is the folder of the model that is cut, which the small one would replace: save it elsewhere"
        )
