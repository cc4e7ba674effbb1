"""The same prompts answered at several sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from stitched_llama.space import format_count

from .data import Row, pad_token_id
from .prompts import Template


def sample_budgets(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Template,
    rows: Sequence[Row],
    budgets: Sequence[Any] = (),
    max_new_tokens: int = 64,
) -> list[dict[str, Any]]:
    """Greedy answers to the rows' prompts at each budget; by default the smallest size, the largest, and halfway.

    Returns one `{"prompt", "wanted", "answers": {"budget: stitch": text}}` a row.
    """
    if not budgets:
        low, high = model.published[0].params, model.published[-1].params
        budgets = [format_count(low), format_count((low + high) // 2), format_count(high)]
    samples = []
    model.eval()
    for row in rows:
        text = prompt.render(row.instruction, row.input)
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        answers = {}
        for budget in budgets:
            stitch = model.choose(budget)
            with torch.no_grad():
                tokens = model.generate(
                    input_ids=inputs.input_ids,
                    attention_mask=inputs.attention_mask,
                    stitch_id=stitch.stitch_id,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=pad_token_id(tokenizer),
                )
            answer = tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            answers[f"{budget}: stitch {stitch.stitch_id}, {format_count(stitch.params)}"] = answer
        samples.append({"prompt": text, "wanted": row.output, "answers": answers})
    return samples
