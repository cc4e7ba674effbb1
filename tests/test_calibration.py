"""Calibration: what is fitted to what, on which tokens, and what is told about it."""

import weakref

import pytest
import torch
from conftest import FAMILIES, fresh, ids_like, spread
from image_anchors import build, vit
from test_least_squares import direct

from stitched_llama import (
    PSTConfig,
    StitchedLlamaForCausalLM,
    StitchedSwinForImageClassification,
    StitchedViTForImageClassification,
)
from stitched_llama.layers import LeastSquares
from stitched_llama.models import calibration
from stitched_llama.training import pico_anchor

pytestmark = pytest.mark.filterwarnings("ignore:.*junctions do not fit:UserWarning")  # random anchors never do
FAMILY_OPTIONS = [
    ("unequal", {}),
    ("unequal", {"direction": "slow-to-fast"}),
    ("equal", {"kernel_size": 2}),
    ("three", {}),
]


def padded_batches(count=5, rows=6, tokens=20):
    """Batches with padding on the left and on the right."""
    batches = []
    for seed in range(count):
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, -7:] = 0
        mask[1, :5] = 0
        ids = ids_like(rows, tokens, seed).masked_fill(mask == 0, 0)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def collected(model, junction, batches):
    """All rows of X and Y of a junction, padding left out, in float64."""
    x, y = [], []
    for batch in batches:
        kept = batch["attention_mask"].bool()
        x.append(model.block_outputs(junction.head, **batch).leaves[junction.head_stop - 1][kept])
        y.append(model.block_outputs(junction.tail, **batch).enters[junction.tail_start][kept])
    return torch.cat(x).double(), torch.cat(y).double()


def test_block_outputs_are_what_enters_each_block(stitched):
    model, batch = stitched("unequal"), padded_batches(1)[0]
    kept = batch["attention_mask"].bool()
    for number, anchor in enumerate(model.anchors):
        found = model.block_outputs(number, **batch)
        entered = []
        hooks = [
            block.register_forward_pre_hook(lambda module, args, entered=entered: entered.append(args[0]))
            for block in anchor.model.layers
        ]
        with torch.no_grad():
            anchor(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        assert len(found.enters) == len(found.leaves) == len(entered)
        for one, other in zip([*found.enters, *found.leaves], [*entered, *entered[1:]]):
            torch.testing.assert_close(one[kept], other[kept])
        torch.testing.assert_close(found.enters[0], anchor.model.embed_tokens(batch["input_ids"]).detach())


@pytest.mark.parametrize(("family", "options"), FAMILY_OPTIONS)
@pytest.mark.parametrize("shared", ["joint", "mean"])
def test_stitching_layers_are_the_least_squares_on_collected_activations(family, options, shared, anchors):
    model, batches = fresh(anchors[family], **options), padded_batches()
    report = model.calibrate(batches, ridge=1e-10, shared=shared, row_weights="none", progress=False)
    assert report.rows == 5 * (6 * 20 - 12)
    by_layer = {}
    for junction in model.space.junctions:
        by_layer.setdefault(junction.layer, []).append(collected(model, junction, batches))
    assert set(by_layer) == set(model.stitching_layers)
    for name, pairs in by_layer.items():
        solutions = [direct(*pair) for pair in pairs]
        if shared == "joint":
            solutions = [direct(*(torch.cat(side) for side in zip(*pairs)))]
        for found, wanted in zip(model.stitching_layers[name].core.parameters(), zip(*solutions)):
            torch.testing.assert_close(found.double(), torch.stack(wanted).mean(0), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("family", "options"), [FAMILY_OPTIONS[2], ("equal", {"direction": "slow-to-fast"})])
def test_a_junction_into_block_0_aims_at_the_embedding(family, options, anchors):
    model, batches = fresh(anchors[family], **options), padded_batches()
    into_first = [junction for junction in model.space.junctions if junction.tail_start == 0]
    assert into_first
    junction, batch = into_first[0], batches[0]
    _, y = collected(model, junction, [batch])
    kept = batch["attention_mask"].bool()
    embedded = model.anchors[junction.tail].model.embed_tokens(batch["input_ids"])[kept]
    torch.testing.assert_close(y.float(), embedded.detach())


def test_padding_is_left_out_whatever_stands_there(anchors):
    batches = padded_batches()
    plain, noisy = fresh(anchors["unequal"]), fresh(anchors["unequal"])
    report = plain.calibrate(batches, progress=False)
    for batch in batches:
        padding = batch["attention_mask"] == 0
        batch["input_ids"][padding] = ids_like(6, 20, 99)[padding]
    again = noisy.calibrate(batches, progress=False)
    for one, other in zip(plain.stitching_layers.parameters(), noisy.stitching_layers.parameters()):
        torch.testing.assert_close(one, other)
    assert again.loss == pytest.approx(report.loss)
    assert again.r2 == pytest.approx(report.r2)


def test_relative_weights_count_every_row_by_the_norm_of_its_target(anchors):
    model, batches = fresh(anchors["unequal"]), padded_batches()
    model.calibrate(batches, ridge=1e-10, row_weights="relative", progress=False)
    for name, layer in model.stitching_layers.items():
        served = [junction for junction in model.space.junctions if junction.layer == name]
        x, y = (torch.cat(side) for side in zip(*(collected(model, junction, batches) for junction in served)))
        weight, bias = direct(x, y, 1 / y.square().sum(1))
        torch.testing.assert_close(layer.core.weight.double(), weight, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(weight, direct(x, y)[0], atol=1e-3)


def test_report_is_complete_and_measured_on_batches_kept_out(anchors):
    model, batches = fresh(anchors["three"], **FAMILIES["three"][1]), padded_batches(9)
    report = model.calibrate(batches, progress=False)
    names = {str(junction) for junction in model.space.junctions}
    assert set(report.r2) == set(report.r2_with_first) == names
    assert set(report.loss) == {s.key for s in model.space}
    assert report.held_out
    assert report.rows == 8 * (6 * 20 - 12)
    key, junction = model.keys[2], model.space.junctions[0]
    x, y = collected(model, junction, batches[7:8])
    predicted = model.stitching_layers[junction.layer](x.float()).double()
    weights = 1 / y.square().sum(1, keepdim=True)  # every row counts relative to its norm
    mean = (weights * y).sum(0) / weights.sum()
    total = (weights * y.square()).sum() - weights.sum() * mean.square().sum()
    wanted = 1 - (weights * (y - predicted).square()).sum() / total
    assert report.r2_with_first[str(junction)] == pytest.approx(float(wanted), abs=1e-4)
    mask = batches[7]["attention_mask"]
    labels = batches[7]["input_ids"].masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # nothing is predicted from padding
    with torch.no_grad():
        loss = model(**batches[7], labels=labels, stitch_id=key).loss
    assert report.loss[key] == pytest.approx(float(loss), rel=1e-5)
    assert model.table.metrics["loss_before"] == report.loss
    assert all(name in str(report) for name in (*names, *report.loss))
    assert not fresh(anchors["unequal"]).calibrate(padded_batches(3), progress=False).held_out


def test_first_token_is_told_apart(anchors):
    model, batch = fresh(anchors["unequal"]), {"input_ids": ids_like(16, 30)}
    for anchor in model.anchors:  # the first token's activation, blown up, as in real LLaMAs
        anchor.model.embed_tokens.weight.data[7] *= 300
    batch["input_ids"][:, 0] = 7
    report = model.calibrate([batch], row_weights="none", progress=False)
    for name, value in report.r2.items():
        assert report.r2_with_first[name] > value + 0.15, name


@torch.no_grad()
def rotated_twin(small, rotation):
    """`small` in rotated coordinates, with a block that does nothing after the first: 3 blocks become 4."""
    large = spread(pico_anchor(32, 4, 4, 2, vocab_size=260))
    for name, parameter in large.named_parameters():
        source = name
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            source = f"model.layers.{max(0, int(number) - 1)}.{rest}"
        value = small.get_parameter(source)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value = torch.zeros_like(value) if ".layers.1." in name else rotation.T @ value
        elif value.ndim > 1:
            value = value @ rotation
        parameter.copy_(value)
    return large


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ({"input_ids": torch.ones(1, 4).long()}, "batch 0 is a str"), (["text"], "batch 0 is a str"),
        ([{"input_ids": [[1, 2]]}], "batch 0 has input_ids list"), ([{"ids": torch.ones(1, 4)}], "batch 0 has input_ids NoneType"),
        ([torch.ones(1, 4)], "batch 0 is a Tensor"),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_named(batches, reason, anchors):
    with pytest.raises(ValueError, match=f"dicts with input_ids as a tensor: {reason}"):
        fresh(anchors["unequal"]).calibrate(batches, progress=False)


@pytest.mark.filterwarnings("ignore:.*junctions do not fit", "ignore:.*ridge decides")
def test_what_was_measured_before_training_decides_nothing_after(anchors, tmp_path):
    model = fresh(anchors["unequal"])
    model.calibrate([{"input_ids": ids_like(2, 9, seed)} for seed in range(3)], progress=False)
    assert model.table.deciding == "loss_before"
    model.attach_pst(PSTConfig(rank=2))
    assert model.table.deciding is None
    assert [stitch.key for stitch in model.published] == ["0[0:3]", "1[0:5]"]
    model.save_pretrained(tmp_path)
    again = StitchedLlamaForCausalLM.from_pretrained(tmp_path, budget="1B")
    assert again.keys == ["1[0:5]"]


def test_calibrating_joins_anchors_that_are_linear_images_of_each_other():
    """RMSNorm does not see a rotation, so after the fit every stitch must compute what both anchors do."""
    small = spread(pico_anchor(32, 3, 4, 2, vocab_size=260))
    for name, parameter in small.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    torch.manual_seed(0)
    model = StitchedLlamaForCausalLM.from_anchors([small, rotated_twin(small, rotation)])
    batch = {"input_ids": ids_like(8, 30)}

    @torch.no_grad()
    def gaps():
        plain = model(**batch, stitch_id="0[0:3]").logits
        return {s.key: float((model(**batch, stitch_id=s.key).logits - plain).abs().max()) for s in model.space}

    before = gaps()
    assert before["1[0:4]"] < 1e-3
    assert len(before) == 4  # the fifth would have more parameters than the large anchor
    assert min(gap for key, gap in before.items() if ">" in key) > 0.5
    report = model.calibrate([batch], ridge=1e-10, progress=False)
    assert min(report.r2.values()) > 0.9999
    assert max(gaps().values()) < 0.01
    assert max(report.loss.values()) - min(report.loss.values()) < 0.01
    for layer in model.stitching_layers.values():
        torch.testing.assert_close(layer.core.weight, rotation.T, atol=1e-3, rtol=1e-2)


def with_massive_first_token():
    """A pair of linear images of each other, but for token 1: massive in two channels, and a hundred times more so in the twin."""
    small = spread(pico_anchor(32, 3, 4, 2, vocab_size=260))
    for name, parameter in small.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1)
    small.model.embed_tokens.weight.data[1] = 0
    small.model.embed_tokens.weight.data[1, [3, 7]] = 40.0
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    twin = rotated_twin(small, rotation)
    twin.model.embed_tokens.weight.data[1] *= 100
    torch.manual_seed(0)
    batches = [{"input_ids": ids_like(8, 30, seed)} for seed in range(9)]
    for batch in batches:
        batch["input_ids"][:, 0] = 1
    return [small, twin], batches


def test_massive_activations_of_the_first_token_do_not_own_the_fit():
    pair, batches = with_massive_first_token()
    model = StitchedLlamaForCausalLM.from_anchors(pair)
    report = model.calibrate(batches, progress=False)
    assert min(report.r2.values()) > 0.95
    assert not report.unchanged
    alone = report.loss["1[0:4]"]
    assert max(report.loss.values()) - alone < 0.05 * alone
    owned = StitchedLlamaForCausalLM.from_anchors(pair)
    with pytest.warns(UserWarning, match="junctions do not fit"):
        plain = owned.calibrate(batches, row_weights="none", progress=False)
    assert max(plain.r2.values()) < 0 < min(plain.r2_with_first.values())


@pytest.mark.filterwarnings("ignore:.*rows for the 32 features", "ignore:.*junctions do not fit")
def test_a_solution_that_is_worse_than_the_identity_is_not_taken():
    """The twin is nearly the small anchor itself; the rows of the fit are hardly more than the features."""
    small = spread(pico_anchor(32, 3, 4, 2, vocab_size=260))
    twin = rotated_twin(small, torch.eye(32))
    for parameter in twin.model.layers[0].parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model = StitchedLlamaForCausalLM.from_anchors([small, twin])
    said = small.generate(ids_like(8, 1), do_sample=False, min_new_tokens=5, max_new_tokens=5)  # what both predict well
    batches = [{"input_ids": row[None]} for row in said]
    before = {key: model.calibration_loss(batches[7], key)[0] for key in model.keys}
    report = model.calibrate(batches, ridge=1e-9, progress=False)
    assert report.unchanged
    assert "not taken" in str(report)
    for stitch in model.space:
        assert report.loss[stitch.key] <= before[stitch.key] + 1e-6
    for name in report.unchanged:
        assert torch.equal(model.stitching_layers[name].core.weight, torch.eye(32))


@pytest.mark.filterwarnings("error:.*junctions do not fit:UserWarning")
def test_poor_fit_and_few_tokens_warn(anchors):
    with pytest.warns(UserWarning, match=r"junctions do not fit.*worst is 0\[:"):
        fresh(anchors["unequal"]).calibrate(padded_batches(3), progress=False)
    with pytest.warns(UserWarning, match="24 rows for the 32 features of stitching layer 0_1_"):
        fresh(anchors["unequal"]).calibrate([{"input_ids": ids_like(2, 12)}], progress=False)


@pytest.mark.parametrize(("count", "told"), [(7, True), (8, False)])
def test_a_report_on_the_rows_of_the_fit_says_so(count, told, anchors):
    with pytest.warns(UserWarning, match="junctions do not fit") as warned:
        report = fresh(anchors["unequal"]).calibrate(padded_batches(count, rows=2), progress=False)
    assert report.held_out != told
    for text in (str(report), str(warned[-1].message)):
        assert ("on the rows of the fit: give 8 batches or more" in text) == told


@pytest.mark.filterwarnings("ignore:.*the ridge decides:UserWarning")
def test_refused_calibrations(anchors):
    model = fresh(anchors["unequal"])
    for options, named in (({"shared": "sum"}, "'sum'"), ({"row_weights": "big"}, "'big'")):
        with pytest.raises(ValueError, match=named):
            model.calibrate(padded_batches(1), **options)
    with pytest.raises(ValueError, match="no batches"):
        model.calibrate([], progress=False)
    nothing = {"input_ids": ids_like(2, 5), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="no activations|not padding"):
        model.calibrate([nothing], progress=False)
    model.attach_pst(PSTConfig(rank=2))
    with pytest.raises(ValueError, match="before attach_pst"):
        model.calibrate(padded_batches(1))


def test_calibrate_leaves_mode_and_anchors_as_they_were(anchors):
    model = fresh(anchors["unequal"])
    before = {name: tensor.clone() for name, tensor in model.anchors.state_dict().items()}
    model.train()
    model.calibrate(iter(padded_batches(2)), progress=False)
    assert model.training
    for name, tensor in model.anchors.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- the alignment stage


def divergences(model, batch):
    """Of each stitch from the anchor of its tail, over the tokens that are not padding; by the definition."""
    kept, found = batch["attention_mask"].bool(), {}
    with torch.no_grad():
        for stitch in model.space:
            anchor = model.space.anchor_stitch(stitch.segments[-1].anchor).key
            p = model(**batch, stitch_id=anchor, use_cache=False).logits[kept].double().softmax(-1)
            q = model(**batch, stitch_id=stitch.key, use_cache=False).logits[kept].double().softmax(-1)
            found[stitch.key] = float((p * (p / q).log()).sum(-1).mean())
    return found


@pytest.mark.parametrize("family", ["unequal", "three"])
def test_alignment_brings_every_stitch_nearer_to_its_tail_and_touches_nothing_else(family, anchors):
    model, batches = fresh(anchors[family], **FAMILIES[family][1]), padded_batches(8)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n.startswith("anchors")}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    report = model.calibrate(batches, progress=False)
    first = divergences(model, batches[0])
    assert report.loss_unaligned == {}
    again = model.calibrate(batches, align_steps=150, align_rate=1e-2, progress=False)
    last = divergences(model, batches[0])
    assert again.loss_unaligned == pytest.approx(report.loss)
    assert "unaligned" in str(again)
    for stitch in model.space:
        if stitch.is_anchor:
            assert last[stitch.key] == first[stitch.key] == 0
        elif family == "unequal":  # where routes share layers one may pay for another
            assert last[stitch.key] < first[stitch.key], stitch.key
    assert sum(last.values()) < 0.95 * sum(first.values())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name], name
        assert parameter.grad is None, name
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    model.attach_pst(PSTConfig(rank=2))


def test_alignment_is_deterministic_and_keeps_the_dtype(anchors):
    def made():
        model = fresh(anchors["unequal"], dtype=torch.bfloat16)
        model.calibrate(padded_batches(4), align_steps=3, progress=False)
        return model

    one, other = made(), made()
    plain = fresh(anchors["unequal"], dtype=torch.bfloat16)
    plain.calibrate(padded_batches(4), progress=False)
    moved = False
    for name, layer in one.stitching_layers.items():
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert layer.out_dtype == torch.bfloat16
        assert torch.equal(layer.core.weight, other.stitching_layers[name].core.weight)
        moved = moved or not torch.equal(layer.core.weight, plain.stitching_layers[name].core.weight)
    assert moved


@torch.no_grad()
def divergence(model, pictures):
    """Mean over the stitches of the divergence of what they say from what the large anchor says."""
    large, found = model.space.anchor_stitch(-1).key, []
    for stitch in model.space:
        for batch in pictures if stitch.junctions else ():
            own, word = (model(**batch, stitch_id=key).logits.log_softmax(-1) for key in (stitch.key, large))
            found.append(float((word.exp() * (word - own)).sum(-1).mean()))
    return sum(found) / len(found)


def test_sums_are_gone_before_the_report(anchors, monkeypatch):
    """They are the largest thing there is by then."""
    model, made, left, report = fresh(anchors["unequal"]), [], [], calibration._report

    def tracked(*given, **how):
        squares = LeastSquares(*given, **how)
        made.append(weakref.ref(squares))
        return squares

    monkeypatch.setattr(calibration, "LeastSquares", tracked)
    monkeypatch.setattr(calibration, "_report", lambda *given: left.extend(one() for one in made) or report(*given))
    model.calibrate(padded_batches(2), progress=False)
    assert len(left) == len(model.stitching_layers)
    assert set(left) == {None}


def test_image_models_align_too(tmp_path):
    torch.manual_seed(0)
    model = StitchedViTForImageClassification.from_anchors([vit(16, 3), vit(24, 3)])
    pictures = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    model.calibrate(pictures, progress=False)
    wanted = divergence(model, pictures)
    model.calibrate(pictures, align_steps=60, progress=False)
    assert divergence(model, pictures) < 0.5 * wanted


def test_adapters_of_half_precision_anchors_keep_their_float32_parts():
    torch.manual_seed(0)
    how = {"adapter": "bottleneck", "adapter_norm": "batch", "rescale": "bilinear", "across_stages": True}
    swins = [anchor.to(torch.bfloat16) for anchor in build("swin")]
    model = StitchedSwinForImageClassification.from_anchors(swins, **how)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    pictures = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    model.calibrate(pictures, align_steps=2, progress=False)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    model.attach_pst(PSTConfig(rank=2))
    key = next(stitch.key for stitch in model.space if stitch.junctions)
    model.train()(pictures[0]["pixel_values"], stitch_id=key).logits.sum().backward()


def test_refused_alignments(anchors):
    model = fresh(anchors["unequal"])
    layer = next(iter(model.stitching_layers.values())).core
    before = layer.weight.clone()
    for options, named in (
        ({"align_steps": -1}, "align_steps is -1"),
        ({"align_steps": 2, "align_rate": 0.0}, "align_rate 0.0"),
    ):
        with pytest.raises(ValueError, match=named):
            model.calibrate(padded_batches(1), **options)
    assert torch.equal(before, layer.weight)
