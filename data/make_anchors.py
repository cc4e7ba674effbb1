"""The recipe that made the demo anchors (and the larger ones on books): two LLaMAs that can be stitched.

    python data/make_anchors.py --preset demo --output data/anchors [--large data/anchors/large]
    python data/make_anchors.py --preset books --text FILE... --output DIR
    python data/make_anchors.py --preset demo --large data/anchors/large --apart --output DIR    # the control

Command, machine, time and losses of the committed pair stand in `data/anchors/README.md`.
Steps: tokenizer and corpus; pretrain the large anchor (`--large` takes one that is there already); cut the small one
out of it; train that with cross-entropy plus feature alignment at the junctions. The alignment is trained in, on
purpose: two models trained apart do not stitch this well. `--apart` makes that control: the small anchor starts from its
own random numbers and meets only text.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from corpora import Corpus, book_tokenizer, books_corpus, byte_tokenizer, demo_corpus, split_books
from pruning import prune
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VALIDATION_BLOCKS = 256


@dataclass(frozen=True)
class Size:
    """The shape of one anchor."""

    width: int
    depth: int
    heads: int
    key_value_heads: int
    head_size: int
    units: int


@dataclass(frozen=True)
class Preset:
    """All that is set for one pair of anchors."""

    large: Size
    small: Size
    large_steps: int
    small_steps: int
    batch: int
    block: int
    context: int
    muon_rate: float
    adam_rate: float
    pieces: int | None = None  # of the tokenizer; None: bytes
    autocast: bool = False  # bfloat16 products: slower than float32 below a width of about 256 on a CPU
    alignment: float = 0.5
    warm_up: float = 0.03
    clip: float = 1.0


PRESETS = {
    "demo": Preset(
        large=Size(width=128, depth=9, heads=4, key_value_heads=2, head_size=32, units=384),
        small=Size(width=76, depth=7, heads=4, key_value_heads=2, head_size=32, units=208),
        large_steps=3000,
        small_steps=1500,
        alignment=30.0,
        batch=24,
        block=128,
        context=512,
        muon_rate=0.01,
        adam_rate=3e-3,
    ),
    "books": Preset(
        large=Size(width=384, depth=8, heads=12, key_value_heads=6, head_size=32, units=768),
        small=Size(width=192, depth=5, heads=6, key_value_heads=3, head_size=32, units=384),
        large_steps=1400,
        small_steps=400,
        batch=8,
        block=256,
        context=1024,
        muon_rate=0.02,
        adam_rate=2e-3,
        pieces=4096,
        autocast=True,
    ),
}


def llama_config(size: Size, preset: Preset, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.units,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head_size,
        max_position_embeddings=preset.context,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def junctions(small_depth: int, large_depth: int) -> list[tuple[int, int]]:
    """(small block, large block) whose outputs meet: nearest depths, one pair a tail of the large anchor."""
    return [(m * small_depth // large_depth, m) for m in range(large_depth - 1)]


class Alignment(nn.Module):
    """How far the small anchor's features are from predicting the large one's, through learned projections.

    One affine projection a small block, as one stitching layer serves all junctions that leave a block. It
    starts by sending each kept channel to where it came from.
    """

    def __init__(self, large: LlamaForCausalLM, small_config: LlamaConfig, channels: Tensor):
        super().__init__()
        self.junctions = junctions(small_config.num_hidden_layers, large.config.num_hidden_layers)
        self.large = [large]  # in a list: a frozen guest, not a part
        blocks = sorted({small_block for small_block, _ in self.junctions})
        self.projections = nn.ModuleDict(
            {str(block): nn.Linear(small_config.hidden_size, large.config.hidden_size) for block in blocks}
        )
        for projection in self.projections.values():
            nn.init.zeros_(projection.bias)
            with torch.no_grad():
                projection.weight.zero_()[channels, torch.arange(len(channels))] = 1.0

    def forward(self, tokens: Tensor, small_states: tuple[Tensor, ...]) -> Tensor:
        """Mean over the junctions of squared error / variance; 0 is perfect, 1 is no better than the mean."""
        with torch.no_grad():
            large_states = self.large[0].model(tokens, output_hidden_states=True).hidden_states
        errors = []
        for small_block, large_block in self.junctions:
            target = large_states[large_block + 1]  # [batch, block, width]; state 0 is the embedding
            projected = self.projections[str(small_block)](small_states[small_block + 1])
            variance = (target - target.mean((0, 1))).square().mean()
            errors.append((projected - target).square().mean() / variance)
        return torch.stack(errors).mean()


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then cosine to a fiftieth."""
    warm_up_steps = max(1, round(warm_up * steps))
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(1, steps - warm_up_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers_of(model: LlamaForCausalLM, extra: nn.Module | None, preset: Preset) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head, norms and projections."""
    hidden = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    rest += list(extra.parameters()) if extra is not None else []
    return [
        torch.optim.Muon(hidden, lr=preset.muon_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=preset.adam_rate, weight_decay=0.01, betas=(0.9, 0.95)),
    ]


def train(
    name: str, model: LlamaForCausalLM, corpus: Corpus, steps: int, preset: Preset, alignment: Alignment | None = None
) -> float:
    """Train in place; returns the last alignment error (0 where there is none)."""
    model.train()
    optimizers = optimizers_of(model, alignment, preset)
    rate = partial(schedule, steps=steps, warm_up=preset.warm_up)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=name, mininterval=10)
    error = torch.zeros(())
    for step in bar:
        tokens = corpus.batch(preset.batch)  # [batch, block]
        with torch.autocast("cpu", torch.bfloat16, enabled=preset.autocast):
            output = model(tokens, labels=tokens, output_hidden_states=alignment is not None, use_cache=False)
            loss = output.loss
            if alignment is not None:
                error = alignment(tokens, output.hidden_states)
                loss = loss + preset.alignment * error
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), preset.clip)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{output.loss.item():.3f}", error=f"{error.item():.3f}", refresh=False)
    return error.item()


@torch.no_grad()
def validation_losses(model: LlamaForCausalLM, corpus: Corpus, batch: int) -> dict[str, float]:
    """Mean cross-entropy in nats a token on what each source holds out."""
    model.eval()
    losses = {}
    for name in corpus.sources:
        parts = corpus.validation(name, VALIDATION_BLOCKS).split(batch)
        losses[name] = sum(model(part, labels=part).loss.item() * len(part) for part in parts)
        losses[name] = round(losses[name] / sum(map(len, parts)), 4)
    return losses


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> LlamaForCausalLM:
    """Write a bfloat16 copy and its tokenizer; returns the copy as read back, in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def measured(make: Callable[[], float]) -> tuple[float, int]:
    """A function's result and the seconds it took."""
    start = time.monotonic()
    result = make()
    return result, round(time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two LLaMA anchors that can be stitched.")
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="text files of the books preset")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets large/ and small/")
    parser.add_argument("--large", type=Path, help="a large anchor of this preset to cut the small one out of")
    parser.add_argument("--large-steps", type=int, help="instead of the preset's")
    parser.add_argument("--small-steps", type=int, help="instead of the preset's")
    parser.add_argument(
        "--apart", action="store_true", help="train the small anchor by itself, neither cut nor aligned"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="1 is faster where other work fills a core")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    preset = replace(
        preset,
        large_steps=arguments.large_steps or preset.large_steps,
        small_steps=arguments.small_steps or preset.small_steps,
    )
    if bool(arguments.text) != (preset.pieces is not None):
        parser.error(
            "--text names the files of the books preset, and the demo preset takes none: "
            "add --text FILE... to books, drop it for demo"
        )
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)

    if preset.pieces is None:
        tokenizer = byte_tokenizer(preset.context)
        steps, seed = (
            (preset.small_steps, arguments.seed + 1) if arguments.large else (preset.large_steps, arguments.seed)
        )
        corpus = demo_corpus(tokenizer, preset.block, steps * preset.batch * preset.block, seed)
    else:
        texts, ends = split_books([path.read_text(encoding="utf-8") for path in arguments.text])
        tokenizer = book_tokenizer(texts, preset.pieces, preset.context)
        corpus = books_corpus(tokenizer, texts, ends, preset.block, arguments.seed)
    for name, (share, training, validation) in corpus.sources.items():
        print(f"{name}: {len(training):,} tokens, {share:.0%} of the blocks; {len(validation):,} held out")

    if arguments.large:
        large, large_seconds = LlamaForCausalLM.from_pretrained(arguments.large, dtype=torch.float32), 0
    else:
        large = LlamaForCausalLM(llama_config(preset.large, preset, tokenizer))
        _, large_seconds = measured(lambda: train("large", large, corpus, preset.large_steps, preset))
    large_losses = validation_losses(large, corpus, preset.batch)

    small_config = llama_config(preset.small, preset, tokenizer)
    if arguments.apart:
        small, alignment = LlamaForCausalLM(small_config), None
    else:
        small, channels = prune(large, small_config, corpus.batch(preset.batch))
        alignment = Alignment(large.requires_grad_(False), small_config, channels)
    error, small_seconds = measured(lambda: train("small", small, corpus, preset.small_steps, preset, alignment))
    small_losses = validation_losses(small, corpus, preset.batch)

    report = {
        "preset": arguments.preset,
        "seed": arguments.seed,
        "apart": arguments.apart,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(preset),
    }
    for name, model, losses, seconds in (
        ("large", large, large_losses, large_seconds),
        ("small", small, small_losses, small_seconds),
    ):
        saved = save(model, tokenizer, arguments.output / name)
        report[name] = {
            "parameters": saved.num_parameters(),
            "seconds": seconds,
            "loss": losses,
            "loss_of_bfloat16_copy": validation_losses(saved, corpus, preset.batch),
        }
    report["alignment_error"] = None if alignment is None else round(error, 4)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
