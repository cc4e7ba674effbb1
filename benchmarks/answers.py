"""Questions answered by several sizes of a bundle, to be read.

    python benchmarks/answers.py BUNDLE --questions question.jsonl --count 10 --sizes 4 --out answers.md

Questions are Vicuna Bench's (JSON lines with `question_id` and `turns` or `question`), spread evenly over its 80; sizes are spread evenly over
the published ones. Decoding is the paper's (ESTA section 5.2: beam 4, top-p 0.75), the prompt the tokenizer's chat template. Prints a table and,
last, one JSON line.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from transformers import set_seed

from stitched_llama import StitchedLlamaForCausalLM
from stitched_llama.space import format_count, printable
from stitched_llama.training import encode_prompt, end_ids, load_tokenizer, pad_token_id, template


def spread(items: list, count: int) -> list:
    """`count` of the items, first and last among them."""
    if count >= len(items):
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer questions at several sizes.")
    parser.add_argument("bundle")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--sizes", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    set_seed(0)
    model = StitchedLlamaForCausalLM.from_pretrained(options.bundle, dtype=options.dtype).eval()
    tokenizer = load_tokenizer(options.bundle)
    prompt = template("auto", tokenizer)
    rows = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    sizes, lines, start, tokens = spread(list(model.published), options.sizes), [], time.time(), 0
    for row in spread(rows, options.count):
        question = row.get("question") or row["turns"][0]
        ids = torch.tensor([encode_prompt(tokenizer, prompt.render(question, ""))])
        lines.append(f"## {row['question_id']}. {printable(question)}\n")
        for stitch in sizes:
            with torch.no_grad():
                found = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), stitch_id=stitch.stitch_id, num_beams=4, do_sample=True, top_p=0.75,
                    max_new_tokens=options.max_new_tokens, pad_token_id=pad_token_id(tokenizer, model.config.vocab_size),
                    eos_token_id=end_ids(tokenizer, model.generation_config, prompt),
                )  # fmt: skip
            tokens += found.shape[1] - ids.shape[1]
            answer = printable(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()
            lines += [
                f"**{format_count(stitch.params)}** (stitch {stitch.stitch_id}):\n",
                *(f"> {line}" for line in answer.splitlines()),
                "",
            ]
            print(f"{row['question_id']:>3} {format_count(stitch.params):>8}  {answer[:90]!r}", flush=True)
    head = f"# Answers at {len(sizes)} sizes\n\n`python benchmarks/answers.py`: beam 4, top-p 0.75, {options.max_new_tokens} new tokens.\n\n"
    options.out.write_text(head + "\n".join(lines))
    print(
        json.dumps(
            {
                "questions": options.count,
                "sizes": [s.stitch_id for s in sizes],
                "tokens": tokens,
                "seconds": round(time.time() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    main()
