"""Every stitch computes what it should: anchors as Transformers runs them, PST born neutral, what is refused."""

import copy
import json
import logging
import threading

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like, randomise, spread
from shapes import config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from stitched_llama import PSTConfig, StitchedLlamaConfig, StitchedLlamaForCausalLM
from stitched_llama.training import pico_anchor

IDS = ids_like(2, 14)
MASK = torch.ones_like(IDS)
MASK[0, -4:] = 0


@torch.no_grad()
def logits(model, ids=IDS, **how):
    return model(ids, **how).logits


def assert_anchors_are_plain(model, plain, **tolerance):
    for number, anchor in enumerate(plain):
        stitch = model.space.anchor_stitch(number)
        wanted = logits(anchor, attention_mask=MASK)
        torch.testing.assert_close(logits(model, attention_mask=MASK, stitch_id=stitch.key), wanted, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_anchor_stitches_equal_plain_llama_and_pst_is_born_neutral(family, anchors):
    plain = [LlamaForCausalLM.from_pretrained(folder) for folder in anchors[family]]
    model = fresh(anchors[family], **FAMILIES[family][1])
    assert_anchors_are_plain(model, plain, atol=1e-5, rtol=0)
    before = {stitch.key: logits(model, attention_mask=MASK, stitch_id=stitch.key) for stitch in model.space}
    gaps = [float((one - before["0[0:3]" if family != "equal" else "0[0:4]"]).abs().max()) for one in before.values()]
    assert sum(gap < 0.1 for gap in gaps) == 1, "stitches do not differ: no test here could fail"
    model.attach_pst(PSTConfig(rank=4))
    assert_anchors_are_plain(model, plain, atol=1e-5, rtol=0)
    for key, wanted in before.items():
        assert torch.equal(logits(model, attention_mask=MASK, stitch_id=key), wanted), key
    randomise(model)
    for key, wanted in before.items():
        assert not torch.allclose(logits(model, attention_mask=MASK, stitch_id=key), wanted, atol=0.01), key


@pytest.mark.parametrize(("family", "fields"), [
    ("mistral", {"sliding_window": None, "num_key_value_heads": 2}), ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"head_dim": 12}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"tie_word_embeddings": True}),
])  # fmt: skip
def test_every_family_of_llama_blocks(family, fields, tmp_path):
    folders, plain = [str(tmp_path / n) for n in "01"], []
    for number, folder in enumerate(folders):
        shape = config(family, 32 + 16 * number, 3 + number, 4, 64, 260, **fields)
        plain.append(spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)), number).eval())
        plain[-1].save_pretrained(folder)
    model = fresh(folders)
    assert_anchors_are_plain(model, plain, atol=1e-5, rtol=0)
    model.attach_pst(PSTConfig(rank=2))
    assert_anchors_are_plain(model, plain, atol=1e-5, rtol=0)
    randomise(model).save_pretrained(tmp_path / "bundle")
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle")
    for stitch in model.space:
        assert torch.equal(logits(again, stitch_id=stitch.key), logits(model, stitch_id=stitch.key)), stitch.key
        generated = [
            again.generate(IDS, stitch_id=stitch.key, max_new_tokens=5, do_sample=False, use_cache=c)
            for c in (True, False)
        ]
        assert torch.equal(*generated), stitch.key


def test_shifted_labels_are_taken_as_by_plain_llama(stitched, anchors):
    plain = LlamaForCausalLM.from_pretrained(anchors["unequal"][1])
    with torch.no_grad():
        found, wanted = (m(IDS, labels=IDS, shift_labels=IDS.flip(1)).loss for m in (stitched("unequal"), plain))
        assert abs(wanted - plain(IDS, labels=IDS).loss) > 0.01
    torch.testing.assert_close(found, wanted)


def test_loss_equals_plain_llama(stitched, anchors):
    plain = LlamaForCausalLM.from_pretrained(anchors["unequal"][1])
    labels = IDS.masked_fill(MASK == 0, -100)
    with torch.no_grad():
        found, wanted = (m(IDS, attention_mask=MASK, labels=labels).loss for m in (stitched("unequal"), plain))
    torch.testing.assert_close(found, wanted)


def test_the_ways_to_name_a_stitch_agree(stitched):
    model = stitched("three", pst=True)
    for number in (0, 3, len(model.space) - 1):
        key = model.space[number].key
        assert torch.equal(logits(model, stitch_id=key), logits(model, stitch_id=number)), number
        assert torch.equal(logits(model, stitch_id=str(number)), logits(model, stitch_id=number)), number
    largest = model.space.anchor_stitch(-1).key
    assert torch.equal(logits(model), logits(model, stitch_id=largest))


def test_embeddings_may_be_given_instead_of_ids(stitched):
    model = stitched("unequal", pst=True)
    for key in ("0[0:3]", model.keys[3], "1[0:5]"):
        embedding = model.anchors[model.space[key].segments[0].anchor].model.embed_tokens
        given = logits(model, None, inputs_embeds=embedding(IDS), stitch_id=key)
        assert torch.equal(given, logits(model, stitch_id=key))
    for wrong in ({}, {"input_ids": IDS, "inputs_embeds": embedding(IDS)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)


@pytest.mark.parametrize("pst", [False, True])
def test_hidden_states_and_attentions_follow_the_route(pst, anchors):
    model = fresh(anchors["unequal"], PSTConfig(rank=2) if pst else None, attn_implementation="eager")
    for stitch in model.space:
        for view in (model, model.pinned(stitch.key)):
            with torch.no_grad():
                output = view(IDS, stitch_id=stitch.key, output_hidden_states=True, output_attentions=True)
            widths = [32 if anchor == 0 else 48 for anchor, _ in stitch.blocks()]
            assert [h.shape[-1] for h in output.hidden_states] == [widths[0], *widths], stitch.key
            heads = [4 if anchor == 0 else 6 for anchor, _ in stitch.blocks()]
            assert [a.shape[1] for a in output.attentions] == heads
            head = model.anchors[stitch.segments[-1].anchor]
            torch.testing.assert_close(head.lm_head(output.hidden_states[-1]), output.logits)
    assert model(IDS).hidden_states is None


def test_pinned_runs_one_stitch_and_leaves_the_model_alone(stitched):
    model = stitched("unequal", pst=True)
    view = model.pinned(2)
    wanted = logits(model, stitch_id=2)
    assert torch.equal(logits(view), wanted)
    assert torch.equal(logits(view, stitch_id=4), wanted)
    assert model.pinned_key is None
    assert model.config.default_stitch_id is None
    assert torch.equal(logits(model), logits(model, stitch_id=len(model.space) - 1))
    assert all(one is other for one, other in zip(view.parameters(), model.parameters()))
    budget = model.space[0].params
    assert torch.equal(logits(model.pinned(budget=budget)), logits(model, stitch_id=0))
    with pytest.raises(ValueError, match="ids are 0"):
        model.pinned(99)


def test_a_view_of_a_wrapped_model_runs_its_own_stitch(anchors):
    model, calls = fresh(anchors["unequal"]), []
    wanted = logits(model, stitch_id=1)
    model.forward = lambda *args, forward=model.forward, **how: calls.append(how) or forward(*args, **how)
    assert torch.equal(logits(model.pinned(1)), wanted)
    assert torch.equal(logits(model.pinned(1), stitch_id=3), wanted)
    assert len(calls) == 2


def test_default_stitch_is_a_setting_of_the_configuration(anchors):
    model = fresh(anchors["unequal"])
    for number in (0, "0[0:2]>1[3:5]"):
        model.config.default_stitch_id = number
        assert torch.equal(logits(model), logits(model, stitch_id=number))


def test_threads_with_different_stitches_do_not_meet(stitched):
    model = stitched("three", pst=True)
    keys = [model.keys[i] for i in (0, 4, len(model.keys) - 1)]
    wanted = {key: logits(model, stitch_id=key) for key in keys}
    wrong, start = [], threading.Barrier(len(keys))

    def work(key):
        start.wait()
        for _ in range(15):
            if not torch.equal(logits(model, stitch_id=key), wanted[key]):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("stitch_id", [99, -1, "0[0:1]>1[9:9]", 1.5])
def test_unknown_stitch_is_named(stitch_id, stitched):
    for call in (
        lambda m: m(IDS, stitch_id=stitch_id),
        lambda m: m.generate(IDS, stitch_id=stitch_id, max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"is not in this space; ids are 0\.\.5"):
            call(stitched("unequal"))


def test_a_cache_of_another_stitch_is_refused(stitched):
    model = stitched("unequal")
    cache = model(IDS, stitch_id=2, use_cache=True).past_key_values
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its parts are looked for below)
        model(IDS[:, :1], stitch_id=3, past_key_values=cache)
    assert all(model.space[number].key in str(error.value) for number in (2, 3))
    model(IDS[:, :1], stitch_id=2, past_key_values=cache)


def saved(folder, tokenizer=None, **fields):
    fields = {"width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "vocab_size": 260, **fields}
    model = spread(pico_anchor(**fields))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_anchors_that_do_not_belong_together_are_named(anchors, tmp_path, tokenizer):
    small, large = anchors["unequal"]
    with pytest.raises(ValueError, match=r"wrong order.*parameters.*small to large"):
        StitchedLlamaForCausalLM.from_anchors([large, small])
    with pytest.raises(ValueError, match="1 anchor given"):
        StitchedLlamaForCausalLM.from_anchors([small])
    with pytest.raises(ValueError, match="vocab_size is 260 .* and 300 in"):
        StitchedLlamaForCausalLM.from_anchors([small, saved(tmp_path / "v", width=64, vocab_size=300)])
    with pytest.raises(TypeError, match="dtpye"):
        StitchedLlamaForCausalLM.from_anchors([small, large], dtpye="float32")
    other = type(tokenizer).from_pretrained(small)
    content = json.loads(other.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    other = type(tokenizer)(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(content)), pad_token="<pad>"
    )
    with pytest.raises(ValueError, match="piece 'A' has id") as error:
        StitchedLlamaForCausalLM.from_anchors([small, saved(tmp_path / "t", other, width=64)])
    assert str(vocabulary["A"]) in str(error.value)
    assert str(vocabulary["B"]) in str(error.value)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2' is not supported; one of llama"):
        StitchedLlamaForCausalLM.from_anchors([small, str(tmp_path / "gpt")])


def test_sliding_window_is_refused_from_files_and_objects(tmp_path):
    shape = config("mistral", 32, 3, 4, 64, 260, sliding_window=128)
    for number in range(2):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(tmp_path / str(number))
    with pytest.raises(ValueError, match="sliding window of 128"):
        StitchedLlamaForCausalLM.from_anchors([str(tmp_path / "0"), str(tmp_path / "1")])


def test_vocabulary_cannot_be_resized(stitched):
    with pytest.raises(ValueError, match="resize each anchor"):
        stitched("unequal").resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"an embedding of its own: set it by model.anchors\[i\]"):
        stitched("unequal").set_input_embeddings(torch.nn.Embedding(3, 3))


@pytest.mark.parametrize("pst", [False, True])
def test_forward_compiles_as_one_graph(pst, stitched):
    model = stitched("unequal", pst)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True, dynamic=False)
    for key in (model.keys[3], "1[0:5]"):
        with torch.no_grad():
            found = compiled(IDS, attention_mask=torch.ones_like(IDS), stitch_id=key, use_cache=False).logits
        torch.testing.assert_close(found, logits(model, stitch_id=key), atol=1e-4, rtol=1e-4)


def test_configuration_needs_anchors(stitched):
    with pytest.raises(ValueError, match="from_anchor_configs"):
        StitchedLlamaConfig().stitch_space()
    made = stitched("unequal").config
    assert (made.num_hidden_layers, made.hidden_size, made.head_dim, made.vocab_size) == (5, 48, 12, 260)


def test_tokenizers_of_equal_pieces_that_read_differently_are_refused(anchors, tmp_path, tokenizer, caplog):
    small = anchors["unequal"][0]
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"]["add_prefix_space"] = True
    special = {name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token")}

    def rebuilt(**changed):
        backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
        return type(tokenizer)(tokenizer_object=backend, **{**special, **changed})

    with pytest.raises(ValueError, match="as different ids though their pieces are the same"):
        StitchedLlamaForCausalLM.from_anchors([small, saved(tmp_path / "p", rebuilt(), width=64)])
    with pytest.raises(ValueError, match="bos_token_id is 1 .* and 2 in"):
        StitchedLlamaForCausalLM.from_anchors([small, saved(tmp_path / "b", rebuilt(bos_token="</s>"), width=64)])
    with pytest.raises(ValueError, match="a list of two or more anchors"):
        StitchedLlamaForCausalLM.from_anchors(small)
    with caplog.at_level(logging.WARNING):
        StitchedLlamaForCausalLM.from_anchors([small, saved(tmp_path / "none", width=64)])
    assert "has no tokenizer that could be compared" in caplog.text


def test_bytes_follow_the_dtype(anchors):
    model = fresh(anchors["unequal"])
    before = [stitch.weight_bytes for stitch in model.space]
    for change, share in (
        (lambda: model.to(torch.bfloat16), 2),
        (model.float, 1),
        (model.half, 2),
        (model.bfloat16, 2),
    ):
        change()
        assert [share * stitch.weight_bytes for stitch in model.space] == before


def test_forward_takes_no_budget(stitched):
    with pytest.raises(ValueError, match=r"no budget: pass stitch_id=model\.choose\(budget\)"):
        stitched("unequal")(ids_like(1, 4), budget="1M")


def test_masks_and_positions_follow_the_rows_to_another_device(stitched, monkeypatch):
    """Anchors on two devices, of which this machine has one: `meta` stands in for the other."""
    model = stitched("unequal")
    family, moved = model.families[1], []
    run = type(family).run
    rows = torch.empty(1, 4, 48, device="meta")
    context = model._context(0, torch.zeros(1, 4, 32), torch.ones(1, 4))
    large = copy.deepcopy(model.anchors[1]).to("meta")
    for block in large.model.layers:
        block.register_forward_pre_hook(lambda _, args, kwargs: moved.append(kwargs), with_kwargs=True)
    assert run(family, large, rows, 1, 5, 1, context).device.type == "meta"
    assert {kwargs["position_ids"].device.type for kwargs in moved} == {"meta"}


def test_a_default_that_was_not_loaded_gives_way(made, bundle, tmp_path):
    made.config.default_stitch_id = 5
    made.save_pretrained(tmp_path / "b")
    part = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "b", stitch_id=2)
    assert part.stitch().stitch_id == 2
    config = AutoConfig.from_pretrained(tmp_path / "b")
    StitchedLlamaForCausalLM.from_pretrained(tmp_path / "b", config=config, stitch_id=2)
    assert len(StitchedLlamaForCausalLM.from_pretrained(tmp_path / "b", config=config).keys) == len(made.space)
