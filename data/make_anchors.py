"""Two LLaMAs of 13.8 M and 3.2 M parameters with one tokenizer, trained apart from each other on any plain text.

    python data/make_anchors.py --text FILE... --output DIR

Steps: a tokenizer of 4,096 pieces; each anchor trained with cross-entropy on blocks of the text. Independent anchors stitch badly
(R2 about .5): a small anchor that stitches well is cut out of the large one and aligned to it by `stitched-llama shrink`.
Needs `sentencepiece`. Prints settings, losses and seconds as one JSON line.
"""

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from corpora import Corpus, book_tokenizer, pack, split_books
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VALIDATION_BLOCKS = 256
SIZES = {
    "large": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 12, "intermediate_size": 768},
    "small": {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6, "intermediate_size": 384},
}  # two query heads of 32 share a key-value head


@dataclass(frozen=True)
class Settings:
    """What both anchors are trained with; the products are of bfloat16."""

    pieces: int = 4096
    context: int = 1024
    batch: int = 8
    block: int = 256
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    warm_up: float = 0.03
    clip: float = 1.0


def llama_config(size: dict[str, int], context: int, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        **size,
        vocab_size=len(tokenizer),
        num_key_value_heads=size["num_attention_heads"] // 2,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then cosine to a fiftieth."""
    warm_up_steps = max(1, round(warm_up * steps))
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(1, steps - warm_up_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers_of(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(hidden, lr=settings.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.adam_rate, weight_decay=0.01, betas=(0.9, 0.95)),
    ]


def train(name: str, model: LlamaForCausalLM, corpus: Corpus, steps: int, settings: Settings) -> None:
    """Trains in place."""
    model.train()
    optimizers = optimizers_of(model, settings)
    rate = partial(schedule, steps=steps, warm_up=settings.warm_up)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=name, mininterval=10)
    for step in bar:
        tokens = corpus.batch(settings.batch)  # [batch, block]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, corpus: Corpus, batch: int) -> float:
    """Mean cross-entropy in nats a token on what is held out."""
    model.eval()
    parts = corpus.validation_blocks(VALIDATION_BLOCKS).split(batch)
    total = sum(model(part, labels=part).loss.item() * len(part) for part in parts)
    return round(total / sum(map(len, parts)), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two LLaMA anchors on plain text.")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="text files; the last 2 %% of each are held out"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that gets large/ and small/")
    parser.add_argument("--large-steps", type=int, default=1400)
    parser.add_argument("--small-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where other work fills a core")
    arguments = parser.parse_args()
    settings = Settings()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    texts, ends = split_books([path.read_text(encoding="utf-8") for path in arguments.text])
    tokenizer = book_tokenizer(texts, settings.pieces, settings.context)
    corpus = Corpus(pack(tokenizer, texts), pack(tokenizer, ends), settings.block, arguments.seed)
    print(f"{len(corpus.training):,} tokens; {len(corpus.validation):,} held out")
    report = {
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(settings),
    }
    for name, steps in (("large", arguments.large_steps), ("small", arguments.small_steps)):
        model = LlamaForCausalLM(llama_config(SIZES[name], settings.context, tokenizer))
        start = time.monotonic()
        train(name, model, corpus, steps, settings)
        seconds = round(time.monotonic() - start)
        loss = validation_loss(model, corpus, settings.batch)
        model.to(torch.bfloat16).save_pretrained(arguments.output / name)
        tokenizer.save_pretrained(arguments.output / name)
        saved = LlamaForCausalLM.from_pretrained(arguments.output / name, dtype=torch.float32)
        report[name] = SIZES[name] | {
            "steps": steps,
            "parameters": saved.num_parameters(),
            "seconds": seconds,
            "loss": loss,
            "loss_of_bfloat16_copy": validation_loss(saved, corpus, settings.batch),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
