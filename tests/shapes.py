"""Published shapes, written by hand, as their `config.json` has them."""


def config(model_type, width, depth, heads, ffn, vocab=32000, **fields):
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        **fields,
    }


LLAMA_7B = config("llama", 4096, 32, 32, 11008)
LLAMA_13B = config("llama", 5120, 40, 40, 13824)

# name -> (config, published number of parameters)
PUBLISHED = {
    "Llama-2-7B": (LLAMA_7B, 6_738_415_616),
    "Llama-2-13B": (LLAMA_13B, 13_015_864_320),
    "Llama-3.2-1B": (
        config("llama", 2048, 16, 32, 8192, 128256, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "Llama-3.2-3B": (
        config("llama", 3072, 28, 24, 8192, 128256, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        3_212_749_824,
    ),
    "SmolLM2-135M": (
        config("llama", 576, 30, 9, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True),
        134_515_008,
    ),
    "SmolLM2-360M": (
        config("llama", 960, 32, 15, 2560, 49152, num_key_value_heads=5, tie_word_embeddings=True),
        361_821_120,
    ),
    "Qwen2-0.5B": (
        config(
            "qwen2", 896, 24, 14, 4864, 151936, num_key_value_heads=2, tie_word_embeddings=True,
            sliding_window=32768, use_sliding_window=False,
        ),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        config("qwen3", 1024, 28, 16, 3072, 151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "Mistral-7B-v0.3": (
        config("mistral", 4096, 32, 32, 14336, 32768, num_key_value_heads=8, sliding_window=None),
        7_248_023_552,
    ),
}  # fmt: skip

# DeiT-Ti/S/B have these depths; only depths decide which routes there are
VIT = [config("llama", width, 12, width // 64, 4 * width, 1000) for width in (192, 384, 768)]

TOWER = [config("llama", 16 * n, n + 2, 4, 32, 64) for n in (1, 2, 3)]
