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
    """Greedy answers to the rows' prompts at each budget; by default the smallest, middle and largest published size.

    Returns one `{"prompt", "wanted", "answers": {size: text}}` a row.
    """
    if not budgets:
        published = model.published
        spread = sorted({0, len(published) // 2, len(published) - 1})
        budgets = [published[i].params for i in spread]
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
            answers[f"{format_count(stitch.params)} (stitch {stitch.stitch_id})"] = answer
        samples.append({"prompt": text, "wanted": row.output, "answers": answers})
    return samples
