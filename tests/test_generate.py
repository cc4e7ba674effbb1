"""Generation: cached equals uncached in every mode, for every stitch of every pico family."""

import copy
import threading

import pytest
import torch
from conftest import FAMILIES, ids_like
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig, LlamaForCausalLM, TextIteratorStreamer
from transformers.cache_utils import StaticCache

PROMPT = ids_like(1, 9, seed=5)
NEW = 6
PLAIN = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
EVERY = [
    pytest.param(family, pst, id=f"{family}-{'pst' if pst else 'bare'}") for family in FAMILIES for pst in (False, True)
]
WITH_PST = [pytest.param(family, True, id=family) for family in FAMILIES]
ASSISTED = [
    pytest.param(*param.values, id=param.id, marks=[] if param.values[1] else [pytest.mark.slow]) for param in EVERY
]


@torch.no_grad()
def greedy(model, ids, stitch_id, steps=NEW):
    """Greedy decoding by whole forwards: no cache, no `generate`; EOS forbidden, as in PLAIN."""
    for _ in range(steps):
        scores = model(ids, stitch_id=stitch_id, use_cache=False).logits[:, -1]
        scores[:, 2] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(("family", "pst"), EVERY)
def test_cached_equals_uncached(family, pst, stitched):
    model, answers = stitched(family, pst), set()
    for stitch in model.space:
        wanted = greedy(model, PROMPT, stitch.key)
        assert torch.equal(model.generate(PROMPT, stitch_id=stitch.stitch_id, **PLAIN), wanted), stitch.key
        answers.add(tuple(wanted[0].tolist()))
    assert len(answers) > len(model.space) / 2, "too many stitches answer alike"


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_left_padded_rows_equal_single_ones(family, pst, stitched):
    model, short = stitched(family, pst), PROMPT[:, 4:]
    ids = torch.cat([PROMPT, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for stitch in model.space:
        both = model.generate(ids, attention_mask=mask, stitch_id=stitch.key, **PLAIN)
        for row, prompt in ((0, PROMPT), (1, short)):
            single = model.generate(prompt, stitch_id=stitch.key, **PLAIN)
            assert torch.equal(both[row, 9:], single[0, prompt.shape[1] :]), (stitch.key, row)


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_continuation_equals_one_go(family, pst, stitched):
    model = stitched(family, pst)
    for stitch in model.space:
        whole = model.generate(PROMPT, stitch_id=stitch.key, **PLAIN)
        options = {
            **PLAIN,
            "max_new_tokens": 3,
            "min_new_tokens": 3,
            "return_dict_in_generate": True,
            "use_cache": True,
        }
        first = model.generate(PROMPT, stitch_id=stitch.key, **options)
        mask = torch.ones_like(first.sequences)  # a generated padding id is not padding
        cache = first.past_key_values
        second = model.generate(
            first.sequences, attention_mask=mask, stitch_id=stitch.key, past_key_values=cache, **options
        )
        assert torch.equal(second.sequences, whole), stitch.key


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_static_cache_equals_dynamic(family, pst, stitched):
    model = stitched(family, pst)
    for stitch in model.space:
        wanted = model.generate(PROMPT, stitch_id=stitch.key, **PLAIN)
        found = model.generate(
            PROMPT, stitch_id=stitch.key, cache_implementation="static", disable_compile=True, **PLAIN
        )
        assert torch.equal(found, wanted), stitch.key
        cache = StaticCache(config=model.config, max_cache_len=9 + NEW)
        assert torch.equal(model.generate(PROMPT, stitch_id=stitch.key, past_key_values=cache, **PLAIN), wanted), (
            stitch.key
        )


def test_compiled_decoding_on_a_static_cache_equals_greedy(stitched):
    model = stitched("unequal", True)
    compiled = CompileConfig(backend="aot_eager")
    compiled._compile_all_devices = True  # Transformers compiles on GPUs alone otherwise
    for key in (model.keys[2], model.keys[-2]):
        counters.clear()
        found = model.generate(PROMPT, stitch_id=key, cache_implementation="static", compile_config=compiled, **PLAIN)
        assert counters["stats"]["unique_graphs"] > 0
        assert torch.equal(found, greedy(model, PROMPT, key)), key


@pytest.mark.parametrize("implementation", [None, "static"])
def test_the_cache_of_a_call_has_a_layer_for_each_block_of_the_route(implementation, stitched):
    """One more, never filled, and an offloaded cache would wait for it instead of the first."""
    model = stitched("unequal", True)
    how = {**PLAIN, "return_dict_in_generate": True, "disable_compile": True}
    assert len({stitch.depth for stitch in model.space}) > 1
    for stitch in model.space:
        made = model.generate(PROMPT, stitch_id=stitch.key, cache_implementation=implementation, **how)
        assert len(made.past_key_values.layers) == stitch.depth, stitch.key


@pytest.mark.parametrize("implementation", [None, "static"])
def test_a_prompt_in_chunks_equals_the_whole(implementation, stitched):
    model = stitched("unequal", True)
    for key in model.keys:
        how = {"cache_implementation": implementation, "prefill_chunk_size": 4, "disable_compile": True}
        assert torch.equal(model.generate(PROMPT, stitch_id=key, **how, **PLAIN), greedy(model, PROMPT, key)), key


def test_static_cache_is_built_anew_for_another_stitch(stitched):
    """Transformers keeps the static cache of the last call on the model."""
    model = stitched("unequal", True)
    for key in (*model.keys, *model.keys[::-1]):
        found = model.generate(PROMPT, stitch_id=key, cache_implementation="static", disable_compile=True, **PLAIN)
        assert torch.equal(found, greedy(model, PROMPT, key)), key


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_beam_search_cached_equals_uncached_and_plain(family, pst, stitched, anchors):
    model, options = stitched(family, pst), {**PLAIN, "num_beams": 4}
    for stitch in model.space:
        cached, uncached = (
            model.generate(PROMPT, stitch_id=stitch.key, use_cache=use, **options) for use in (True, False)
        )
        assert torch.equal(cached, uncached), stitch.key
    bare = stitched(family)
    for number, folder in enumerate(anchors[family]):
        plain = LlamaForCausalLM.from_pretrained(folder)
        found = bare.generate(PROMPT, stitch_id=bare.space.anchor_stitch(number).key, **options)
        assert torch.equal(found, plain.generate(PROMPT, **options)), number


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_paper_settings_beam_4_top_p_run_and_repeat(family, pst, stitched):
    model = stitched(family, pst)
    options = {"num_beams": 4, "do_sample": True, "top_p": 0.75, "max_new_tokens": NEW}
    for key in model.keys[::3]:
        found = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            found.append(model.generate(PROMPT.repeat(2, 1), stitch_id=key, use_cache=use_cache, **options))
        assert torch.equal(*found), key
        assert found[0].shape[1] <= 9 + NEW


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_sampling_repeats_with_a_seed(family, pst, stitched):
    model, found = stitched(family, pst), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        found.append(
            model.generate(PROMPT, stitch_id=2, do_sample=True, top_p=0.9, max_new_tokens=NEW, use_cache=use_cache)
        )
    assert torch.equal(*found)


@pytest.mark.parametrize(("family", "pst"), ASSISTED)
def test_assisted_by_a_smaller_stitch_equals_greedy(family, pst, stitched):
    model = stitched(family, pst)
    for stitch in model.space:
        wanted = model.generate(PROMPT, stitch_id=stitch.key, **PLAIN)
        assistants = [0] if stitch.stitch_id % 2 else ["0[0:3]" if family != "equal" else "0[0:4]", model.pinned(1)]
        for assistant in assistants:
            found = model.generate(PROMPT, stitch_id=stitch.key, assistant_model=assistant, **PLAIN)
            assert torch.equal(found, wanted), (stitch.key, assistant)


def test_assistant_drafts_with_its_own_stitch(stitched, monkeypatch):
    model, seen = stitched("unequal"), []
    route = type(model).stitch
    monkeypatch.setattr(type(model), "stitch", lambda self, s=None: seen.append((self.pinned_key, s)) or route(self, s))
    model.generate(PROMPT, stitch_id=4, assistant_model=1, **PLAIN)
    run = {route(model, pinned if pinned is not None else asked).stitch_id for pinned, asked in seen}
    assert run == {1, 4}


@pytest.mark.parametrize(("family", "pst"), WITH_PST)
def test_prompt_lookup_equals_greedy(family, pst, stitched):
    model, prompt = stitched(family, pst), PROMPT.repeat(1, 3)
    for stitch in model.space:
        wanted = model.generate(prompt, stitch_id=stitch.key, **PLAIN)
        assert torch.equal(model.generate(prompt, stitch_id=stitch.key, prompt_lookup_num_tokens=3, **PLAIN), wanted), (
            stitch.key
        )


def test_streamers_in_threads_give_what_generate_gives(stitched, tokenizer):
    model = stitched("three", True)
    keys = [model.keys[i] for i in (0, 5, len(model.keys) - 1)]
    wanted = [
        tokenizer.decode(model.generate(PROMPT, stitch_id=key, **PLAIN)[0, 9:], skip_special_tokens=True)
        for key in keys
    ]
    streamers = [TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) for _ in keys]
    threads = [
        threading.Thread(
            target=model.generate, args=(PROMPT,), kwargs={"stitch_id": key, "streamer": streamer, **PLAIN}
        )
        for key, streamer in zip(keys, streamers)
    ]
    for thread in threads:
        thread.start()
    assert ["".join(streamer) for streamer in streamers] == wanted
    for thread in threads:
        thread.join()


def test_generate_refuses_the_cache_of_another_stitch(stitched):
    model, cache = stitched("unequal"), DynamicCache()
    model(PROMPT, stitch_id=2, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be continued by"):
        model.generate(torch.cat([PROMPT, PROMPT], 1), stitch_id=3, past_key_values=cache, **PLAIN)


def test_budget_chooses_the_stitch(stitched):
    model = stitched("unequal")
    for key in ("0[0:3]", "1[0:5]"):
        found = model.generate(PROMPT, budget=model.space[key].params, **PLAIN)
        assert torch.equal(found, greedy(model, PROMPT, key))
    with pytest.raises(ValueError, match=r"budget '9' is too small: the smallest size is stitch 0"):
        model.generate(PROMPT, budget=9, **PLAIN)
    with pytest.raises(ValueError, match="stitch_id 1 and budget '9B' both given"):
        model.generate(PROMPT, stitch_id=1, budget="9B", **PLAIN)


def test_a_memory_budget_counts_the_cache_of_the_call(stitched):
    model = stitched("unequal")
    large = model.space.anchor_stitch(-1)
    rows, tokens = 2, 9 + NEW
    exact = large.weight_bytes + rows * tokens * large.kv_bytes_per_token
    prompts = PROMPT.repeat(rows, 1)
    for spare, key in ((0, "1[0:5]"), (-1000, "0[0:3]")):
        found = model.generate(prompts, budget=f"{(exact + spare) / 1000}kB", **PLAIN)
        assert torch.equal(found, greedy(model, prompts, key)), key
    beams = model.generate(prompts, budget=f"{exact / 1000}kB", num_beams=4, **PLAIN)
    assert torch.equal(beams, model.generate(prompts, stitch_id="0[0:3]", num_beams=4, **PLAIN))


@pytest.mark.parametrize(("name", "value"), [("stitch_id", 2), ("budget", "9B")])
def test_a_generation_config_that_would_swallow_the_stitch_is_refused(name, value, stitched):
    model = stitched("unequal")
    config = copy.deepcopy(model.generation_config)
    setattr(config, name, value)
    for call in ({"generation_config": config}, {}):
        view = model.pinned(2)
        if not call:
            view.generation_config = config
        with pytest.raises(ValueError, match="default_stitch_id"):
            view.generate(PROMPT, **call, **PLAIN)


def test_a_misspelt_argument_is_refused(stitched):
    with pytest.raises(ValueError, match="stich_id"):
        stitched("unequal").generate(PROMPT, stich_id=2, **PLAIN)


def test_the_pipeline_of_transformers_takes_a_stitch(stitched, tokenizer):
    from transformers import pipeline

    model = stitched("unequal")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = tokenizer.decode(PROMPT[0])
    found = pipe(text, stitch_id=2, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, return_full_text=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    wanted = greedy(model, ids, 2)[0, ids.shape[1] :]
    assert found[0]["generated_text"] == tokenizer.decode(wanted, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("how", "tokens"),
    [
        ({"max_new_tokens": 5}, 2 * 14), ({"max_new_tokens": 5, "num_beams": 3}, 6 * 14),
        ({"max_new_tokens": 5, "num_return_sequences": 4, "do_sample": True}, 8 * 14),
        ({"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2}, 8 * 14),
        ({"generation_config": GenerationConfig(max_new_tokens=6)}, 2 * 15),
        ({"generation_config": GenerationConfig(num_beams=2), "own": 7}, 4 * 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", ["ids", "embeds", "positional"])
def test_a_budget_of_memory_counts_the_whole_cache(how, tokens, given, stitched, monkeypatch):
    model, ids = stitched("unequal"), ids_like(2, 9)
    seen = []
    monkeypatch.setattr(type(model), "choose", lambda self, budget, context: seen.append(context) or self.stitch(0))
    monkeypatch.setattr(model.generation_config, "max_new_tokens", how.get("own"))
    how = {name: value for name, value in how.items() if name != "own"}
    embeds = model.anchors[0].get_input_embeddings()(ids)
    prompt = {"inputs_embeds": embeds} if given == "embeds" else {"input_ids": ids}
    how, args = dict(how), ()
    if given == "positional" and "generation_config" in how:
        prompt, args = {}, (ids, how.pop("generation_config"))
    model.generate(*args, **prompt, **how, budget="1GB")
    assert seen == [tokens]
