"""Saves a shrunk model as a plain Transformers folder with a model card."""

from pathlib import Path
from typing import Any

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
    """Saves the student; its `config.json` gets `shrunk_from`: the model it was cut from, its depth, `target_blocks`, and the parts
    that are the same tensors (`shared`).

    Args:
        source: folder or Hub id of the model it was cut from.
        tokens: of the distillation, for the card.
    """
    student, teacher = model.student, model.teacher
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
    student.save_pretrained(folder)
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
    (Path(folder) / "README.md").write_text(_CARD.format(**fields), encoding="utf-8")
