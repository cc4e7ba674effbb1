"""Costs counted twice: by arithmetic, and on built models, real caches and a FLOP counter."""

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like
from shapes import PUBLISHED, config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from stitched_llama import Precision, StitchSpace
from stitched_llama.pst import is_low_rank
from stitched_llama.space import anchor_spec


def built(fields, **how):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), **how)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_count_as_published_and_as_built(name):
    fields, params = PUBLISHED[name]
    with torch.device("meta"):
        model = built(fields)
    spec = anchor_spec(fields)
    assert spec.params == params == model.num_parameters()
    for index in (0, -1):
        block = model.model.layers[index]
        assert spec.blocks[index].params == sum(p.numel() for p in block.parameters())
        linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
        assert spec.blocks[index].linear_params == sum(module.weight.numel() for module in linears)
        for part, d_in, d_out in spec.blocks[index].adapted:
            assert getattr(block.self_attn, part).weight.shape == (d_out, d_in)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True, "head_dim": 20}),
        ("mistral", {"num_key_value_heads": 1, "head_dim": 8}),
        ("qwen2", {"num_key_value_heads": 2}),
        ("qwen3", {"head_dim": 24, "attention_bias": True}),
    ],
)
def test_biases_head_sizes_and_ties_count_right(family, fields, tied):
    fields = config(
        family, 64, 2, 4, 96, 128, sliding_window=None, tie_word_embeddings=tied, **{"head_dim": 16, **fields}
    )
    model, spec = built(fields), anchor_spec(fields)
    assert spec.params == model.num_parameters()
    assert spec.blocks[0].params == sum(p.numel() for p in model.model.layers[0].parameters())
    assert spec.embedding.params == model.model.embed_tokens.weight.numel()
    assert spec.tied == tied


def route_tensors(model, stitch):
    """The tensors one stitch needs before PST, each once."""
    first, last = (model.anchors[stitch.segments[i].anchor] for i in (0, -1))
    modules = [first.model.embed_tokens, last.model.norm, last.lm_head]
    modules += [model.anchors[a].model.layers[b] for a, b in stitch.blocks()]
    modules += [model.stitching_layers[junction.layer] for junction in stitch.junctions]
    found = {id(p): p for m in modules for name, p in m.named_parameters(prefix="x") if not is_low_rank(name)}
    return found.values()


@pytest.mark.parametrize("pst", [False, True], ids=["bare", "pst"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stitch_counts_the_tensors_on_its_route(family, pst, stitched):
    model = stitched(family, pst)
    for stitch in model.space:
        tensors = route_tensors(model, stitch)
        assert stitch.params == sum(t.numel() for t in tensors), stitch.key
        assert stitch.weight_bytes == sum(t.nbytes for t in tensors), stitch.key


def test_tied_anchors_count_the_matrix_once_on_one_route(tmp_path):
    for number in (1, 2):
        fields = config("llama", 16 * number, number + 1, 4, 32, vocab=64, tie_word_embeddings=True)
        built(fields).save_pretrained(tmp_path / str(number))
    model = fresh([str(tmp_path / "1"), str(tmp_path / "2")])
    for stitch in model.space:
        assert stitch.params == sum(t.numel() for t in route_tensors(model, stitch)), stitch.key


@pytest.mark.parametrize("family", ["unequal", "three"])
def test_macs_against_a_flop_counter(family, anchors):
    tokens = 24
    model = fresh(anchors[family], attn_implementation="eager", **FAMILIES[family][1])
    space = model.space.with_precision(Precision(context_tokens=tokens))
    ids = ids_like(1, tokens)
    for stitch in space:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, stitch_id=stitch.key, use_cache=False)
        macs = counter.get_total_flops() / 2
        assert macs == pytest.approx(tokens * stitch.macs, rel=0.005), stitch.key  # the rest is RoPE


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_against_a_real_cache(family, stitched):
    model, tokens = stitched(family), 7
    for stitch in model.space:
        cache = DynamicCache()
        model(ids_like(1, tokens), stitch_id=stitch.key, past_key_values=cache, use_cache=True)
        used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert used == tokens * stitch.kv_bytes_per_token, stitch.key
        assert len(cache.layers) == stitch.depth


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_weight_bytes_against_bitsandbytes(bits, anchors):
    import bitsandbytes as bnb

    settings = BitsAndBytesConfig(load_in_8bit=True)
    if bits == "4bit":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = fresh(anchors["unequal"], quantization_config=settings, dtype=torch.bfloat16)
    assert model.space.precision == Precision("bfloat16", bits)

    def nbytes(tensor, scales):
        return tensor.nbytes + (scales.get(id(tensor), 0))

    scales = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            scales[id(module.weight)] = module.weight.SCB.nbytes
        elif isinstance(module, bnb.nn.Linear4bit):
            scales[id(module.weight)] = module.weight.quant_state.absmax.nbytes
    assert len(scales) == 7 * (3 + 5)
    for stitch in model.space:
        assert stitch.weight_bytes == sum(nbytes(t, scales) for t in route_tensors(model, stitch)), stitch.key


def test_precision_is_checked_and_changes_bytes_alone():
    configs = [PUBLISHED["Llama-2-7B"][0], PUBLISHED["Llama-2-13B"][0]]
    half, full = (StitchSpace.from_configs(configs, precision=Precision(d)) for d in ("bfloat16", "float32"))
    assert half.digest == full.digest
    for one, other in zip(half, full):
        assert (2 * one.params, 4 * one.params) == (one.weight_bytes, other.weight_bytes)
        assert other.kv_bytes_per_token == 2 * one.kv_bytes_per_token
        assert one.macs == other.macs
    assert half[0].kv_bytes_per_token == 2 * 2 * 32 * 4096  # Llama-2-7B: half a megabyte a token
    for wrong in ({"dtype": "int4"}, {"quantization": "3bit"}, {"context_tokens": -1}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            Precision(**wrong)
