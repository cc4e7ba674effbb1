"""What a pair of demo anchors knows before any fine-tuning, on inputs that pretraining never saw.

    python data/check_anchors.py data/anchors [--examples 40]

Prints, for each anchor, the loss on held-out text and the exact match of every skill: given three examples in
the notation of pretraining, and asked in the words of an instruction (which should be close to zero).
An answer counts when every token of it, and the end of its line, is the argmax after the tokens before it:
the same as greedy decoding, in one forward pass.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

import skills
import torch
from corpora import demo_corpus
from make_anchors import PRESETS, validation_losses
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def few_shot_prompt(task: skills.Skill, text: str, rng: random.Random) -> str:
    """Three solved training inputs and an open one, in notation."""
    solved = [skills.draw_input(task, False, rng) for _ in range(3)]
    lines = [f"{task.notation} {example} -> {task.answer(example)}\n" for example in solved]
    return "".join(lines) + f"{task.notation} {text} -> "


def instruction_prompt(task: skills.Skill, text: str, rng: random.Random) -> str:
    return f"{rng.choice(task.wordings)}\n{text}\n"


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Iterable[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs whose answer greedy decoding would give."""
    prompts, answers = zip(*pairs, strict=True)
    rows = [
        tokenizer(prompt + answer + "\n", return_tensors="pt").input_ids[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    correct = model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:]  # causal: padding is never seen
    spans = [
        slice(len(tokenizer(prompt).input_ids) - 1, len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)
    ]
    return mean(float(line[span].all()) for line, span in zip(correct, spans, strict=True))


def check(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: int) -> dict[str, object]:
    """Exact match of each skill, few-shot and asked by instruction, and their means."""
    few_shot, instructed = {}, {}
    for task in skills.SKILLS.values():
        rng = random.Random(f"check/{task.name}")
        inputs = [skills.draw_input(task, True, rng) for _ in range(examples)]
        if task.notation:
            few_shot[task.name] = exact_match(
                model, tokenizer, [(few_shot_prompt(task, text, rng), task.answer(text)) for text in inputs]
            )
        instructed[task.name] = exact_match(
            model, tokenizer, [(instruction_prompt(task, text, rng), task.answer(text)) for text in inputs]
        )
    return {
        "few_shot": round(mean(few_shot.values()), 4),
        "instructed": round(mean(instructed.values()), 4),
        "few_shot_by_skill": {name: round(share, 3) for name, share in few_shot.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo anchors before fine-tuning.")
    parser.add_argument("anchors", type=Path, help="folder that holds large/ and small/")
    parser.add_argument("--examples", type=int, default=40, help="held-out inputs a skill")
    arguments = parser.parse_args()
    preset = PRESETS["demo"]
    for name in ("large", "small"):
        tokenizer = AutoTokenizer.from_pretrained(arguments.anchors / name, trust_remote_code=False)
        model = LlamaForCausalLM.from_pretrained(arguments.anchors / name, dtype=torch.float32).eval()
        corpus = demo_corpus(tokenizer, preset.block, training_tokens=2 * preset.block, seed=0)
        report = {
            "anchor": name,
            "parameters": model.num_parameters(),
            "loss": validation_losses(model, corpus, preset.batch),
            **check(model, tokenizer, arguments.examples),
        }
        print(json.dumps(report))


if __name__ == "__main__":
    main()
