"""Shrinking: the cut, the distillation, the folder that comes out, and how it is stitched to the model it was cut from."""

import json

import pytest
import torch
from conftest import ids_like, python, spread

from stitched_llama import PSTConfig, StitchedLlamaForCausalLM, StitchSpace
from stitched_llama.cli import main
from stitched_llama.models import propose_junctions
from stitched_llama.shrinking import (
    ShrinkArguments,
    ShrinkDistillation,
    ShrinkTrainer,
    TokenBlocks,
    cut_model,
    heads_for_width,
    load_delta,
    read_documents,
    save_delta,
    save_shrunk,
)
from stitched_llama.space import block_groups
from stitched_llama.training import SpaceArguments, evaluate_stitches, measured_options, pico_anchor, propose_routes
from stitched_llama.training.route_search import exchanged_route


def large(tied=True, depth=5):
    torch.manual_seed(0)
    return spread(pico_anchor(48, depth, 6, 3, vocab_size=260, head_dim=8, tie_word_embeddings=tied), std=0.1)


@pytest.fixture(scope="module")
def family(tmp_path_factory, tokenizer):
    """Folders of an anchor cut to 3 of 5 blocks, and of the model it was cut from."""
    folder = tmp_path_factory.mktemp("shrunk")
    teacher = large()
    teacher.save_pretrained(folder / "large")
    tokenizer.save_pretrained(folder / "large")
    cut = cut_model(teacher, 3)
    save_shrunk(ShrinkDistillation(cut.model, teacher, cut.target_blocks), folder / "small", str(folder / "large"))
    tokenizer.save_pretrained(folder / "small")
    return [str(folder / "small"), str(folder / "large")]


def test_groups_keep_the_first_and_last_blocks_single():
    assert [list(group) for group in block_groups(5, 3)] == [[0], [1, 2], [3, 4]]
    ends = [group[-1] for group in block_groups(30, 16)]
    assert ends == [0, *range(2, 29, 2), 29]
    for depth in range(2, 20):
        for small in range(2, depth + 1):
            groups = block_groups(depth, small)
            assert [block for group in groups for block in group] == list(range(depth))
            assert len(groups) == small
            assert max(map(len, groups)) - min(map(len, groups)) <= 1
    with pytest.raises(ValueError, match="depth 6 is not in 2..5"):
        block_groups(5, 6)


def test_a_cut_in_depth_copies_the_last_block_of_each_run():
    teacher = large(tied=False)
    cut = cut_model(teacher, 3)
    assert cut.channels is None
    assert cut.target_blocks == [group[-1] for group in block_groups(5, 3)]
    for block, source in zip(cut.model.model.layers, cut.target_blocks):
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, teacher.model.layers[source].state_dict()[name])
    assert torch.equal(cut.model.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(cut_model(teacher, 5).model(ids_like(2, 9)).logits, teacher(ids_like(2, 9)).logits)


def test_a_cut_in_width_keeps_what_is_strong():
    """Half of the channels, heads and units carry nothing; cutting these away changes no logit but by the norm's scale."""
    teacher = large(tied=False)
    dead = torch.arange(48) % 2 == 1
    with torch.no_grad():
        teacher.model.embed_tokens.weight[:, dead] = 0
        for block in teacher.model.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight[dead] = 0
            block.mlp.down_proj.weight[:, 48:] = 0
            block.self_attn.o_proj.weight[:, 16:] = 0  # of the key-value groups 1 and 2
    fields = heads_for_width(teacher.config, 16)
    assert fields == {
        "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32,
    }  # fmt: skip
    cut = cut_model(teacher, 5, 16, [{"input_ids": ids_like(2, 12)}])
    assert not dead[cut.channels].any()
    assert cut.model.config.intermediate_size == 32
    attention = cut.model.model.layers[0].self_attn
    assert torch.equal(attention.q_proj.weight, teacher.model.layers[0].self_attn.q_proj.weight[:16][:, cut.channels])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6,), "depth 6 is not in 2..5"),
        ((3, 17), "width 17 is not a multiple of 16"),
        ((3, 96), "width 96 must lie below the 48"),
        ((3, 16), "no data to measure"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cut_model(large(), *arguments)


def test_distillation_of_an_uncut_copy_is_zero():
    teacher = large()
    cut = cut_model(teacher, 5)
    made = ShrinkDistillation(cut.model, teacher, cut.target_blocks).train()
    for _ in range(4):  # also on mixed routes
        found = made(input_ids=ids_like(2, 12))
        assert float(found["loss"].detach()) == pytest.approx(0, abs=1e-5)


def test_divergence_and_alignment_are_what_they_are_called():
    teacher = large()
    cut = cut_model(teacher, 3)
    spread(cut.model.model.layers, seed=5, std=0.1)
    made = ShrinkDistillation(cut.model, teacher, cut.target_blocks, logit_share=1.0).eval()
    ids = ids_like(2, 12)
    found = made(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        student = cut.model(ids, output_hidden_states=True)
        whole = teacher(ids, output_hidden_states=True)
    pair = [out.logits.log_softmax(-1).flatten(0, 1) for out in (student, whole)]
    wanted = torch.nn.functional.kl_div(*pair, log_target=True, reduction="batchmean")
    assert float(found["divergence"]) == pytest.approx(float(wanted), rel=1e-4)
    distances = [
        1 - torch.cosine_similarity(student.hidden_states[i + 1], whole.hidden_states[block + 1], dim=-1)[:, 1:].mean()
        for i, block in enumerate(cut.target_blocks[:-1])
    ]
    assert float(found["alignment"]) == pytest.approx(float(sum(distances) / len(distances)), rel=1e-4)
    assert float(found["loss"].detach()) == pytest.approx(float(wanted + 2 * sum(distances) / len(distances)), rel=1e-4)


@pytest.mark.parametrize("width", [None, 16])
def test_training_lowers_the_loss_and_resumes_bit_for_bit(width, tmp_path, tokenizer):
    def trainer(folder, steps):
        torch.manual_seed(0)
        teacher = large()
        cut = cut_model(teacher, 3, width, [{"input_ids": ids_like(2, 12)}])
        args = ShrinkArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, save_steps=4, disable_tqdm=True,
            learning_rate=3e-3, lr_scheduler_type="constant", lr_scheduler_kwargs=None,
        )  # fmt: skip
        text = [f"The river {number} runs by the hill {number % 7}." for number in range(60)]
        return ShrinkTrainer(
            model=ShrinkDistillation(cut.model, teacher, cut.target_blocks, cut.channels),
            args=args,
            train_dataset=TokenBlocks(text, tokenizer, 16),
            eval_dataset=TokenBlocks(text, tokenizer, 16, 8, seed=3),
        )

    whole = trainer(tmp_path / "whole", 8)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < 0.9 * before
    again = trainer(tmp_path / "whole", 8)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    states = [made.model.state_dict() for made in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any("teacher" in name for name in states[0])
    frozen = any("embed_tokens" in name for name in states[0])
    assert frozen == (width is not None)  # at equal width embedding and head are the teacher's


def test_what_comes_out_is_a_plain_folder(family):
    code = f"""
import torch, sys
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({family[0]!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__name__ == "LlamaForCausalLM" and model.config.use_cache
assert "stitched_llama" not in sys.modules
print(model.config.shrunk_from["target_blocks"])
"""
    assert python("-c", code).stdout.strip() == "[0, 2, 4]"


def test_aligned_stitches_share_the_embedding_and_count_it_once(family):
    space = StitchSpace.from_configs(family, junctions="aligned")
    assert [s.key for s in space] == ["0[0:3]", "0[0:2]>1[3:5]", "1[0:5]"]
    assert space.options["adapter"] == "identity"
    assert not space.stitching_layers
    model = StitchedLlamaForCausalLM.from_anchors(family, junctions="aligned")
    assert model.anchors[0].model.embed_tokens.weight is model.anchors[1].model.embed_tokens.weight
    for stitch in space:
        parts = [model.anchors[a].model.layers[b] for a, b in stitch.blocks()]
        parts += [model.anchors[stitch.segments[0].anchor].model.embed_tokens]
        last = model.anchors[stitch.segments[-1].anchor]
        parts += [last.model.norm, last.lm_head]
        counted = {id(p): p.numel() for part in parts for p in part.parameters()}
        assert sum(counted.values()) == stitch.params
    one = StitchedLlamaForCausalLM.from_anchors(family, junctions="aligned", adapter="linear")
    assert sum(len(s.layers) for s in one.space) == 1


def test_an_identity_stitch_is_the_blocks_in_a_row(family):
    model = StitchedLlamaForCausalLM.from_anchors(family, junctions="aligned")
    ids = ids_like(2, 9)
    hidden = model.anchors[0].model.embed_tokens(ids)
    rotary = model.anchors[0].model.rotary_emb(hidden, position_ids=torch.arange(9)[None])
    with torch.no_grad():
        for anchor, block in model.space["0[0:2]>1[3:5]"].blocks():
            hidden = model.anchors[anchor].model.layers[block](
                hidden, attention_mask=None, position_embeddings=rotary, position_ids=None
            )
        wanted = model.anchors[1].lm_head(model.anchors[1].model.norm(hidden))
        torch.testing.assert_close(model(ids, stitch_id="0[0:2]>1[3:5]").logits, wanted)
        short = model.generate(ids[:1], stitch_id=1, max_new_tokens=5, do_sample=False)
    plain = ids[:1]
    for _ in range(5):
        with torch.no_grad():
            plain = torch.cat([plain, model(plain, stitch_id=1).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(short, plain)


@pytest.mark.parametrize("adapter", ["identity", "linear"])
def test_a_bundle_of_aligned_anchors_loads_equal_whole_and_in_part(adapter, family, tmp_path):
    model = StitchedLlamaForCausalLM.from_anchors(family, junctions="aligned", adapter=adapter)
    ids = ids_like(2, 9)
    model.save_pretrained(tmp_path / "bundle")
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle")
    assert again.config.junctions == [[0, 1, 1, 3]]
    assert again.anchors[0].model.embed_tokens.weight is again.anchors[1].model.embed_tokens.weight
    part = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", stitch_id=1)
    for loaded in (again, part):
        assert torch.equal(loaded(ids, stitch_id=1).logits, model(ids, stitch_id=1).logits)
    held = {id(p): p.numel() for p in part.parameters()}
    assert sum(held.values()) == part.space[1].params


def test_every_size_loads_alone_where_anchors_that_share_an_embedding_train_whole(family, tmp_path):
    keys = ["1[0:1]>0[1:2]>1[3:5]", "0[0:2]>1[3:5]"]
    model = StitchedLlamaForCausalLM.from_anchors(family, routes=keys, adapter="identity")
    model.attach_pst(PSTConfig(full=True))
    spread(model, std=0.1)
    ids = ids_like(2, 9)
    wanted = {key: model(ids, stitch_id=key).logits for key in model.keys}
    model.save_pretrained(tmp_path / "bundle")
    for key in model.keys:
        part = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "bundle", stitch_id=key)
        assert torch.equal(part(ids, stitch_id=key).logits, wanted[key])
        part.save_pretrained(tmp_path / "part")
        again = StitchedLlamaForCausalLM.from_pretrained(tmp_path / "part")
        assert torch.equal(again(ids, stitch_id=key).logits, wanted[key])
    held = model._own_tensors(["1[0:5]"])
    assert any(t is model.anchors[1].model.embed_tokens.weight for t in held.values())  # under the other anchor's name


def test_another_model_of_the_same_shape_is_refused(family, tmp_path, tokenizer):
    spread(large(), seed=9).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="anchor 1 has another one: give the model that it was cut from"):
        StitchedLlamaForCausalLM.from_anchors([family[0], str(tmp_path)], junctions="aligned")


def test_junctions_that_are_not_there_are_refused(family, anchors):
    with pytest.raises(ValueError, match="no anchor was cut from another"):
        StitchSpace.from_configs(anchors["unequal"], junctions="aligned")
    config = json.loads(open(f"{family[0]}/config.json").read())
    config["shrunk_from"]["target_blocks"] = [3, 1, 4]
    with pytest.raises(ValueError, match="ascending target_blocks"):
        StitchSpace.from_configs([config, family[1]], junctions="aligned")
    for junctions, message in (
        ([(0, 5)], "names block 5 of anchor 1"),
        ([(3, 1)], "names block 3 of anchor 0"),
        ([(0, 1), (0, 1)], "given twice"),
        ([(0, 1, 0, 1)], "joins anchor 0 with itself"),
        ([(0.5, 1)], "cannot be read"),
        ([], "empty list"),
    ):
        with pytest.raises(ValueError, match=message):
            StitchSpace.from_configs(family, junctions=junctions)
    with pytest.raises(ValueError, match="leave kernel_size"):
        StitchSpace.from_configs(family, junctions=[(0, 1)], kernel_size=2)
    with pytest.raises(ValueError, match="adapter 'identity' joins equal features"):
        StitchSpace.from_configs(anchors["unequal"], adapter="identity")


def test_routes_given_whole_pass_any_number_of_junctions(family):
    keys = ["1[0:1]>0[1:2]>1[3:5]", "0[0:1]>1[1:3]>0[2:3]"]
    model = StitchedLlamaForCausalLM.from_anchors(family, routes=keys, adapter="identity")
    assert {stitch.key for stitch in model.space} == {*keys, "0[0:3]", "1[0:5]"}
    assert all(len(stitch.junctions) == len(stitch.segments) - 1 for stitch in model.space)
    ids = ids_like(2, 9)
    hidden = model.anchors[1].model.embed_tokens(ids)
    rotary = model.anchors[1].model.rotary_emb(hidden, position_ids=torch.arange(9)[None])
    with torch.no_grad():
        for anchor, block in [(1, 0), (0, 1), (1, 3), (1, 4)]:
            hidden = model.anchors[anchor].model.layers[block](hidden, attention_mask=None, position_embeddings=rotary)
        wanted = model.anchors[1].lm_head(model.anchors[1].model.norm(hidden))
        torch.testing.assert_close(model(ids, stitch_id=keys[0]).logits, wanted)
    for routes, message in (
        (["0[0:3]"], "cannot be read"),
        (["0[0:4]>1[3:5]"], r"names 0\[0:4\], which is not there"),
        (["0[1:2]>1[3:5]"], "must begin with the first block"),
        (["0[0:1]>0[1:3]"], "joins an anchor with itself"),
        (["0[0:2]>1[3:4]>0[1:3]"], "runs a block twice"),
        (keys[:1] * 2, "given twice"),
        ([keys[0], f"0{keys[0]}"], "given twice"),
        ([], "empty list"),
    ):
        with pytest.raises(ValueError, match=message):
            StitchSpace.from_configs(family, routes=routes)
    tied = [
        large(depth=depth).config for depth in (3, 5)
    ]  # the route has the embedding of one and the head of the other
    with pytest.raises(ValueError, match="more than the largest anchor, which has .*: leave it out"):
        StitchSpace.from_configs(tied, routes=["0[0:2]>1[2:5]"])


def test_text_is_read_packed_and_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One paragraph.\n\nAnother one.\n")
    assert read_documents(str(tmp_path / "a.txt"), str) == ["One paragraph.\n\nAnother one.\n\n"]
    blocks = TokenBlocks(["abcdef" * 5, "xyz" * 9], tokenizer, 8, seed=1)
    assert len(blocks) == (30 + 1 + 27 + 1) // 8
    assert blocks[0]["input_ids"].shape == (8,)
    with pytest.raises(ValueError, match="too short to align on: 4 tokens do not fill one block of 8"):
        TokenBlocks(["abc"], tokenizer, 8)
    (tmp_path / "b.txt").write_text(" \n\n ")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(str(tmp_path / "b.txt"), str)


def test_junctions_by_what_fits_are_the_aligned_ones(family, tokenizer):
    """The student's blocks are copies, and the teacher's other blocks hardly change anything: the nearest fit is the aligned one."""
    teacher = large()
    for block in (1, 3):
        for layer in (teacher.model.layers[block].self_attn.o_proj, teacher.model.layers[block].mlp.down_proj):
            layer.weight.data.mul_(0.01)
    student = cut_model(teacher, 3).model
    said = teacher.generate(ids_like(16, 2), do_sample=False, max_new_tokens=10, min_new_tokens=10)
    batches = [{"input_ids": said[start : start + 2]} for start in range(0, 16, 2)]
    found = propose_junctions(StitchedLlamaForCausalLM, [student, teacher], batches, band=2, at_once=3, progress=False)
    best = {}
    for key, loss in found.loss.items():
        first = key.split(">")[0]
        if ">" in key and loss < best.get(first, ("", 9e9))[1]:
            best[first] = key, loss
    assert [best[first][0] for first in sorted(best)] == ["0[0:1]>1[2:5]", "0[0:2]>1[3:5]"]
    assert set(found.proposed) <= set(found.loss)
    assert "yes" in str(found)
    space = StitchSpace.from_configs([student.config, teacher.config], junctions=found.junctions, adapter="identity")
    assert {s.key for s in space if not s.is_anchor} == {key for key in found.proposed if ">" in key}


def test_an_anchor_that_is_not_finite_is_neither_measured_nor_cut():
    teacher = large()
    student = cut_model(teacher, 3).model
    student.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    for adapter, named in (("identity", "stitch .* has the loss nan: weights of an anchor"), ("linear", "hold NaN")):
        with pytest.raises(ValueError, match=named):
            propose_junctions(
                StitchedLlamaForCausalLM,
                [student, teacher],
                [{"input_ids": ids_like(8, 9)}] * 3,
                adapter=adapter,
                progress=False,
            )
    with pytest.raises(ValueError, match="activations of the model that is cut are not finite"):
        cut_model(student, 2, 16, [{"input_ids": ids_like(2, 9)}])


def test_a_delta_brings_the_small_model_back_within_its_bits(tmp_path):
    teacher = large()
    cut = cut_model(teacher, 3)
    small = cut.model
    generator = torch.Generator().manual_seed(4)
    for parameter in small.model.layers.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_shrunk(ShrinkDistillation(small, teacher, cut.target_blocks), tmp_path / "small", "large")
    save_delta(small, teacher, tmp_path / "delta")
    again = load_delta(teacher, tmp_path / "delta")
    for (name, found), wanted in zip(again.state_dict().items(), small.state_dict().values()):
        start = cut_model(teacher, 3).model.state_dict()[name]
        error, change = (found - wanted).norm(), (wanted - start).norm()
        assert error <= 0.15 * change, name
    assert again.config.shrunk_from == small.config.shrunk_from
    size = (tmp_path / "delta/delta.safetensors").stat().st_size
    assert size < 0.6 * sum(p.numel() for p in small.model.layers.parameters()) + 8000
    with pytest.raises(ValueError, match="the model has 4 blocks, the difference in .* is to one of 5"):
        load_delta(large(depth=4), tmp_path / "delta")
    with pytest.raises(ValueError, match="holds no delta.safetensors"):
        load_delta(teacher, tmp_path / "small")
    with pytest.raises(ValueError, match="was not cut in this way"):
        save_delta(cut_model(teacher, 3).model, teacher, tmp_path / "other")


def test_routes_are_searched_greedily_from_both_ends():
    teacher = large(depth=7)
    cut = cut_model(teacher, 4)
    small = cut.model.eval()
    small.config.shrunk_from = {"depth": 7, "target_blocks": cut.target_blocks, "shared": []}
    spread(small, std=0.1)
    ids = ids_like(4, 12)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    groups = block_groups(7, 4)
    free = [index for index, group in enumerate(groups) if len(group) > 1]
    found = propose_routes(StitchedLlamaForCausalLM, [small, teacher], iter([batch]), progress=False)

    def losses(routes):
        model = StitchedLlamaForCausalLM.from_anchors([small, teacher], routes=routes, adapter="identity")
        return evaluate_stitches(model, [batch], routes, progress=False)["loss"]

    upgrades = [exchanged_route(groups, [i == index for i in range(4)]) for index in free]
    downgrades = [exchanged_route(groups, [i != index for i in range(4)]) for index in free]
    best_up, best_down = (min(losses(keys).items(), key=lambda item: item[1]) for keys in (upgrades, downgrades))
    assert found.routes == [best_up[0], best_down[0]]
    assert found.loss == pytest.approx(dict([best_up, best_down]))
    with pytest.raises(ValueError, match="made from the second by `stitched-llama shrink`"):
        propose_routes(StitchedLlamaForCausalLM, [teacher, small], [batch])


def test_options_that_are_measured_first(family, capsys):
    ids = ids_like(2, 9)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    options = measured_options(SpaceArguments(routes=["greedy"]), family, [batch], progress=True)
    assert StitchSpace.from_configs(family, **(SpaceArguments(routes=["greedy"]).options() | options)).options["routes"]
    assert options["routes"][0] in capsys.readouterr().out
    options = measured_options(
        SpaceArguments(junctions=["similar"]), family, [{"input_ids": ids}], band=0, progress=False
    )
    assert options["adapter"] == "identity"
    assert measured_options(SpaceArguments(), family, [batch]) == {}


def test_the_command_counts_the_space_that_the_fine_tune_makes(family, capsys):
    assert main(["space", *family, "--junctions", "aligned", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    space = StitchSpace.from_configs(family, **SpaceArguments(junctions=["aligned"]).options())
    assert [(row["key"], row["params"]) for row in told] == [(stitch.key, stitch.params) for stitch in space]
    assert not space.stitching_layers
    for words in (["--junctions", "similar"], ["--routes", "greedy"]):
        assert main(["space", *family, *words]) == 2
        assert "are measured by finetune" in capsys.readouterr().err
