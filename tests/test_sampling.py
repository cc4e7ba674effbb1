"""Draws are a pure function of (seed, step, importance); scores on numbers worked out by hand."""

import math
from collections import Counter

import pytest
from shapes import LLAMA_7B, LLAMA_13B, TOWER

from stitched_llama import Importance, StitchSampler, StitchSpace
from stitched_llama.sampling import SCHEMES, SCORES, StepSignals
from stitched_llama.space import intervals


@pytest.fixture(scope="module")
def stitches():
    return list(StitchSpace.from_configs([LLAMA_7B, LLAMA_13B]))


def draws(stitches, importance=None, steps=3000, start=0, **options):
    sampler = StitchSampler(stitches, **{"anchor_share": 0.0, **options})
    return [sampler.draw(step, importance or {}) for step in range(start, start + steps)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_a_pure_function_of_seed_and_step(stitches, scheme):
    importance = {s.key: float(s.stitch_id % 7) for s in stitches}
    first = draws(stitches, importance, 60, scheme=scheme, seed=3)
    assert first == draws(stitches, importance, 60, scheme=scheme, seed=3)
    assert first[40:] == draws(stitches, importance, 20, start=40, scheme=scheme, seed=3)  # resume
    assert first != draws(stitches, importance, 60, scheme=scheme, seed=4)


def test_draws_do_not_touch_or_follow_the_global_generator(stitches):
    import random

    random.seed(0)
    state = random.getstate()
    first = draws(stitches, steps=20)
    assert random.getstate() == state
    random.seed(1)
    assert draws(stitches, steps=20) == first


def test_uniform_gives_every_stitch_its_share(stitches):
    counts = Counter(draws(stitches, steps=41 * 100, scheme="uniform"))
    assert len(counts) == 41
    assert 55 < min(counts.values())
    assert max(counts.values()) < 150


def test_interval_gives_every_cost_interval_its_share(stitches):
    groups = intervals([s.params for s in stitches], 6)
    home = {stitches[i].key: number for number, group in enumerate(groups) for i in group}
    for scheme in ("interval", "esta", "importance"):
        counts = Counter(home[key] for key in draws(stitches, steps=6000, scheme=scheme))
        assert len(counts) == 6, scheme
        assert all(850 < count < 1150 for count in counts.values()), scheme


def shares(stitches, scores, steps=4000, **options):
    """Share of the draws of each stitch when all lie in one interval."""
    importance = {s.key: score for s, score in zip(stitches, scores) if score is not None}
    counts = Counter(draws(stitches, importance, steps, interval_count=1, **options))
    return [counts[s.key] / steps for s in stitches]


@pytest.fixture(scope="module")
def three(stitches):
    return [s for s in stitches if not s.is_anchor][:3]


def test_esta_draws_by_softmax_of_raw_importance(three):
    scores = [0.0, 1.0, 2.0]
    total = sum(map(math.exp, scores))
    assert shares(three, scores, scheme="esta") == pytest.approx([math.exp(s) / total for s in scores], abs=0.03)


def test_default_draws_by_softmax_of_z_scores_with_a_floor(three):
    scores, deviation = [0.0, 1.0, 2.0], math.sqrt(2 / 3)
    z = [(score - 1) / deviation for score in scores]
    total = sum(map(math.exp, z))
    wanted = [0.5 / 3 + 0.5 * math.exp(one) / total for one in z]
    assert shares(three, scores) == pytest.approx(wanted, abs=0.03)
    without = [math.exp(one) / total for one in z]
    assert shares(three, scores, floor=0.0) == pytest.approx(without, abs=0.03)
    assert shares(three, scores, floor=1.0) == pytest.approx([1 / 3] * 3, abs=0.03)


@pytest.mark.parametrize(("scale", "shift"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 500.0), (3.0, -9.0)])
def test_default_is_free_of_scale_and_shift(three, scale, shift):
    base = draws(three, {s.key: float(i) for i, s in enumerate(three)}, 200, interval_count=1)
    moved = draws(three, {s.key: scale * i + shift for i, s in enumerate(three)}, 200, interval_count=1)
    assert base == moved


def test_raw_softmax_stands_large_scores(three):
    assert shares(three, [0.0, 900.0, -900.0], 50, scheme="esta") == [0.0, 1.0, 0.0]


def test_a_stitch_never_visited_counts_as_an_average_one(three):
    known = shares(three, [0.0, None, 2.0], floor=0.0)
    assert known == pytest.approx(shares(three, [0.0, 1.0, 2.0], floor=0.0), abs=0.08)
    assert known[0] < known[1] < known[2]


def test_floor_keeps_every_stitch_alive(three):
    low = shares(three, [-1e9, 0.0, 0.0], floor=0.3)[0]
    assert low >= 0.08  # 0.3 / 3, and a z-score's share on top


@pytest.mark.parametrize("scheme", SCHEMES)
def test_anchors_share_their_steps_evenly_whatever_the_scheme(stitches, scheme):
    importance = {s.key: -100.0 if s.is_anchor else 0.0 for s in stitches}
    smallest = stitches[0].key
    often = draws(stitches, importance, scheme=scheme, anchor_share=0.8).count(smallest) / 3000
    never = draws(stitches, importance, scheme=scheme, anchor_share=0.0).count(smallest) / 3000
    assert 0.36 < often < 0.48
    assert never < 0.1
    three = list(StitchSpace.from_configs(TOWER))
    counts = Counter(draws(three, scheme=scheme, anchor_share=1.0, steps=600))
    assert set(counts) == {s.key for s in three if s.is_anchor}
    assert min(counts.values()) > 150


@pytest.mark.parametrize("scheme", ["importance", "esta"])
def test_warm_up_is_uniform(stitches, scheme):
    importance = {s.key: 50.0 * (s.stitch_id == 20) for s in stitches}
    options = {"scheme": scheme, "interval_count": 1, "floor": 0.0}
    counts = Counter(draws(stitches, importance, 1000, warmup_steps=1000, **options))
    assert len(counts) == 41
    assert counts[stitches[20].key] < 60
    assert draws(stitches, importance, 400, 1000, warmup_steps=1000, **options).count(stitches[20].key) > 300 * (
        scheme == "esta"
    )
    assert draws(stitches, importance, 9, 1000, warmup_steps=1000, **options) == draws(
        stitches, importance, 9, 1000, **options
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"scheme": "best"}, ["'best'", "importance"]),
        ({"floor": 1.5}, ["floor is 1.5"]),
        ({"anchor_share": -0.1}, ["anchor_share is -0.1"]),
        ({"stitches": []}, ["no stitches"]),
    ],
)
def test_bad_sampler_settings_are_named(stitches, options, names):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its parts are looked for below)
        StitchSampler(**{"stitches": stitches, **options})
    assert all(name in str(error.value) for name in names)


# ---- importance


@pytest.mark.parametrize(
    ("score", "wanted"),
    [("snip", 6.0), ("snip_per_gradient", 3.0), ("snip_per_loss", 1.5), ("loss", -2.0), ("excess_loss", -1.5)],
)
def test_scores_by_hand(score, wanted):
    signals = StepSignals(saliency=6.0, gradient_norm=2.0, loss=2.0, teacher_loss=0.5)
    assert SCORES[score](signals) == pytest.approx(wanted)


@pytest.mark.parametrize("score", SCORES)
def test_scores_stand_a_step_without_gradient_or_loss(score):
    assert math.isfinite(SCORES[score](StepSignals(0.0, 0.0, 0.0)))


def test_moving_average_by_hand():
    importance = Importance("loss", eta=0.9)
    for loss in (1.0, 2.0, 3.0):
        importance.update("a", StepSignals(0, 0, loss))
    importance.update("b", StepSignals(0, 0, 5.0))
    weights = {-1.0: 0.81, -2.0: 0.9, -3.0: 1.0}  # of the newest 1, each older a factor eta less
    mean = sum(score * weight for score, weight in weights.items()) / sum(weights.values())
    assert importance.averages == pytest.approx({"a": mean, "b": -5.0})
    assert importance.visits == {"a": 3, "b": 1}


def test_a_score_that_is_no_number_is_left_out():
    """As under float16, where a first scale is chosen so large that gradients overflow."""
    importance = Importance("snip")
    for value in (math.inf, 2.0, math.nan):
        importance.update("a", StepSignals(value, 1.0, 1.0))
    assert (importance.averages, importance.visits) == ({"a": 2.0}, {"a": 1})


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"score": "luck"}, "'luck'.*snip"), ({"eta": 1.0}, "eta is 1.0"), ({"eta": -1}, "eta is -1")],
)
def test_bad_importance_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Importance(**settings)
