"""Pico anchors and rows for `--smoke`: a whole run in seconds, without downloads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = ("alpaca", "wool", "hill", "grass", "river", "stone", "cloud", "path", "herd", "snow", "sun", "barn")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and four special tokens; any text round-trips."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def pico_anchor(width: int, depth: int, heads: int, kv_heads: int, vocab_size: int, **fields: Any) -> LlamaForCausalLM:
    """A randomly initialised LLaMA of a few thousand parameters."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **fields},
    )
    return LlamaForCausalLM(config).eval()


def smoke_anchors(args: Any, training: Any) -> tuple[Any, Any]:
    """Arguments of a recipe changed to a short run on pico anchors and rows in `output_dir`/smoke.

    One process of a node writes these files, the others wait for it.
    """
    folder = Path(training.output_dir) / "smoke"
    with training.main_process_first(desc="pico anchors"):
        if training.local_process_index == 0:
            _write(folder, training.seed)
    rows = training.per_device_train_batch_size * max(1, training.world_size)
    training = replace(
        training,
        max_steps=training.max_steps if training.max_steps > 0 else 12,
        global_batch_size=rows * max(1, 8 // rows),
        gradient_accumulation_steps=1,
        learning_rate=3e-3,
        save_strategy="steps",
        save_steps=6,
        logging_steps=4,
    )
    settings = {"eval_size": 16, "calibration_size": 64, "max_length": 64, "template": "short"}
    anchors = [str(folder / "small"), str(folder / "large")]
    return replace(args, anchors=anchors, data=str(folder / "rows.json"), eval_data=None, **settings), training


def _write(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    for name, shape in (("small", (32, 3, 4, 2)), ("large", (48, 5, 6, 3))):
        pico_anchor(*shape, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"instruction": f"{verb} {word}", "input": other if verb == "join" else "", "output": f"{word} {other}"}
        for verb in ("say", "join")
        for word in _WORDS
        for other in _WORDS
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
