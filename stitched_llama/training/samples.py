"""Greedy answers to the same prompts from several stitches."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stitched_llama.space import Stitch, format_count

from .data import pad_token_id
from .prompts import Template, TextTemplate, encode_prompt, end_ids
from .rows import Row


def sample_budgets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Template | TextTemplate,
    rows: Sequence[Row],
    budgets: Sequence[Any] = (),
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Greedy answers to the rows' prompts at each budget; by default of three stitches: the smallest and the largest published one,
    and the published one halfway, or if there is none between them the stitch in the middle.

    Returns one `{"prompt", "wanted", "answers": {"stitch": text}}` a row.
    """
    prompt = prompt.of(tokenizer) if isinstance(prompt, TextTemplate) else prompt
    chosen = [(f"{budget}: ", model.choose(budget)) for budget in budgets]
    chosen = chosen or [("", stitch) for stitch in _default_stitches(model)]
    samples = []
    model.eval()
    for row in rows:
        text = prompt.render(row.instruction, row.input)
        input_ids = torch.tensor([encode_prompt(tokenizer, text)], device=model.device)
        answers = {}
        for budget, stitch in chosen:
            with torch.no_grad():
                tokens = model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    stitch_id=stitch.stitch_id,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=end_ids(tokenizer, model.generation_config, prompt),
                    pad_token_id=pad_token_id(tokenizer, model.config.vocab_size),
                )
            answer = tokenizer.decode(tokens[0, input_ids.shape[1] :], skip_special_tokens=True)
            answers[f"{budget}stitch {stitch.stitch_id}, {format_count(stitch.params)}"] = answer
        samples.append({"prompt": text, "wanted": row.output, "answers": answers})
    return samples


def _default_stitches(model: Any) -> list[Stitch]:
    """Up to three stitches, small to large."""
    low, high = model.published[0], model.published[-1]
    middle = model.choose((low.params + high.params) // 2)
    if middle in (low, high):
        between = [
            model.space[key] for key in model.keys if low.stitch_id < model.space[key].stitch_id < high.stitch_id
        ]
        middle = between[len(between) // 2] if between else low
    return list(dict.fromkeys((low, middle, high)))
