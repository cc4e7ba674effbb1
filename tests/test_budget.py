"""Budgets, the published front, and the rule that a larger budget never gives a worse answer."""

import itertools
import random

import pytest
from shapes import LLAMA_7B, LLAMA_13B, TOWER

from stitched_llama import Budget, StitchSpace, StitchTable
from stitched_llama.space import (
    best_of_intervals,
    format_bytes,
    format_count,
    higher_is_better,
    intervals,
    pareto_front,
)


@pytest.fixture(scope="module")
def llamas():
    return StitchSpace.from_configs([LLAMA_7B, LLAMA_13B])


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("9B", "params", 9e9), ("9b", "params", 9e9), (9e9, "params", 9e9), (9_000_000_000, "params", 9e9),
        ("9_000_000", "params", 9e6), ("9,000", "params", 9e3), ("1.5 M", "params", 1.5e6), ("300k", "params", 3e5),
        ("9e9", "params", 9e9), ("12GB", "memory_bytes", 12e9), ("12 gib", "memory_bytes", 12 * 2**30),
        ("700 MB", "memory_bytes", 7e8), ("5000 kb", "memory_bytes", 5e6), ("1TB", "memory_bytes", 1e12),
        ("8 GMACs", "macs", 8e9), ("8gmacs", "macs", 8e9), ("700 MMACs", "macs", 7e8),
    ],
)  # fmt: skip
def test_budget_reads(text, kind, limit):
    budget = Budget.parse(text)
    assert (budget.kind, budget.limit) == (kind, limit)
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    "text", ["", "big", "B9", "9 XB", "9.9.9B", "-9B", "0", "0GB", "nan", "inf", True, None, "9B 10B"]
)
def test_budget_that_cannot_be_read_shows_examples(text):
    with pytest.raises(ValueError, match="9B"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["24G", "24 g"])
def test_a_bare_g_is_refused_with_both_spellings(text):
    with pytest.raises(ValueError, match=f"{text}.*'24B' for parameters, '24GB' for memory"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["25 tok/s", "300 ms", "2s"])
def test_budget_of_time_says_that_it_needs_a_profile(text):
    with pytest.raises(ValueError, match="profile"):
        Budget.parse(text)


@pytest.mark.parametrize("number", [1, 999, 1000, 6_906_982_400, 13_015_864_320, 999_999, 999_999_999, 1.5e12, 4e15])
def test_formatted_counts_are_short_and_read_back(number):
    for text, kind in ((format_count(number), "params"), (format_bytes(number), "memory_bytes")):
        if kind == "memory_bytes" and number < 1000:
            continue  # "999B" reads as billions of parameters: no budget is so small
        budget = Budget.parse(text)
        assert budget.kind == kind, text
        assert number <= budget.limit <= 1.001 * number + 1, text  # shown sizes can be asked for
        assert "e" not in text


def test_format_as_documented():
    assert (format_count(6906982400), format_bytes(12e9)) == ("6.907B", "12GB")
    assert (format_count(729312), format_count(99_999), format_count(999_999_999)) == ("729.4K", "100K", "1B")


def quality(space, seed):
    generator = random.Random(seed)
    return {stitch.key: generator.random() for stitch in space}


@pytest.mark.parametrize("metric", ["loss", "exact_match", "loss_before"])
@pytest.mark.parametrize("kind", ["params", "memory_bytes", "macs"])
@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_never_gives_a_worse_answer(llamas, seed, kind, metric):
    table = StitchTable().with_metrics(metric, quality(llamas, seed))
    units, context = {"params": "", "memory_bytes": "B", "macs": "MACs"}, 100
    unit = units[kind]
    published = [llamas[key] for key in table.published(llamas)]
    costs = sorted(
        {Budget.parse(f"1{'kb' if kind == 'memory_bytes' else unit}").cost_of(s, context) for s in published}
    )
    scale = 1e3 if kind == "memory_bytes" else 1  # a bare "B" is billions of parameters
    unit = "kB" if kind == "memory_bytes" else unit
    seen = []
    for limit in [*costs, *(cost * 1.001 for cost in costs), 10 * costs[-1]]:
        chosen = table.choose(llamas, f"{limit / scale:.6f}{unit}", context)
        assert Budget.parse(f"1{unit}").cost_of(chosen, context) <= limit * (1 + 1e-9)
        seen.append((limit, table.metrics[metric][chosen.key]))
    values = [value for _, value in sorted(seen)]
    better = higher_is_better(metric)
    assert all(b >= a if better else b <= a for a, b in itertools.pairwise(values))
    assert len(set(values)) > 1


def test_published_front_by_hand():
    space = StitchSpace.from_configs(TOWER[:2])
    loss = dict(zip((s.key for s in space), (3.0, 3.5, 2.0, 2.0, 1.0)))
    assert len(space) == 5
    keys = [s.key for s in space]
    assert pareto_front(list(space), loss, higher_is_better=False) == [keys[0], keys[2], keys[4]]
    assert pareto_front(list(space), loss, higher_is_better=True) == [keys[0], keys[1]]
    del loss[keys[4]]
    assert StitchTable().with_metrics("loss", loss).published(space) == [keys[0], keys[2]]


def test_of_equal_costs_the_front_keeps_the_better_one():
    space = StitchSpace.from_configs([TOWER[0], TOWER[0]])
    same = [s for s in space if s.params == space[0].params]
    assert len(same) == 2
    front = pareto_front(same, {same[0].key: 0.1, same[1].key: 0.9}, higher_is_better=True)
    assert front == [same[1].key]


def test_intervals_are_equal_parts_of_the_range():
    assert intervals([0, 1, 5, 9, 10], 2) == [[0, 1], [2, 3, 4]]
    assert intervals([0, 1, 9, 10], 5) == [[0, 1], [2, 3]]  # empty parts are left out
    assert intervals([7, 7], 3) == [[0, 1]]
    for costs, count in (([], 2), ([1], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            intervals(costs, count)


def test_before_evaluation_importance_chooses_one_of_each_interval(llamas):
    importance = quality(llamas, 3)
    chosen = best_of_intervals(list(llamas), importance, 6)
    groups = intervals([s.params for s in llamas], 6)
    assert chosen == [max((llamas[i].key for i in group), key=importance.get) for group in groups]
    published = StitchTable(importance=importance, interval_count=6).published(llamas)
    assert set(published) == set(chosen) | {llamas[0].key, llamas[40].key}
    assert best_of_intervals(list(llamas), {}, 6) == []
    # anchors are not rated: the intervals stay those of training, which they are part of
    rated = {stitch.key: importance[stitch.key] for stitch in llamas if not stitch.is_anchor}
    for group, key in zip(groups, best_of_intervals(list(llamas), rated, 6), strict=True):
        assert key == max((llamas[i].key for i in group if llamas[i].key in rated), key=rated.get)


def test_before_any_training_only_anchors_are_published(llamas):
    assert StitchTable().published(llamas) == ["0[0:32]", "1[0:40]"]
    assert StitchTable().choose(llamas, "12.9B").key == "0[0:32]"


def test_too_small_a_budget_names_the_smallest_size_and_its_need(llamas):
    table = StitchTable().with_metrics("loss", {"0[0:26]>1[33:40]": 1.0, "1[0:40]": 0.5})
    number = llamas["0[0:26]>1[33:40]"].stitch_id
    with pytest.raises(
        ValueError, match=rf"'6B' is too small.*stitch {number} \(0\[0:26\]>1\[33:40\]\).*7\.799B params"
    ):
        table.choose(llamas, "6B")
    with pytest.raises(ValueError, match="GB memory bytes with 1000 tokens"):
        table.choose(llamas, "1GB", context_tokens=1000)


def test_a_context_makes_memory_scarcer(llamas):
    table = StitchTable().with_metrics("loss", {s.key: -float(s.params) for s in llamas})
    alone = table.choose(llamas, f"{llamas[20].weight_bytes / 1e3}kB")
    assert alone.stitch_id == 20
    tokens = 1 + (llamas[20].weight_bytes - llamas[19].weight_bytes) // llamas[20].kv_bytes_per_token
    assert table.choose(llamas, f"{llamas[20].weight_bytes / 1e3}kB", context_tokens=tokens).stitch_id < 20


def test_choice_is_limited_to_the_stitches_at_hand(llamas):
    table = StitchTable().with_metrics("loss", {s.key: -float(s.params) for s in llamas})
    assert table.choose(llamas, "13.1B", keys=[llamas[4].key]).stitch_id == 4


def test_stitches_at_hand_that_were_never_evaluated_can_still_be_chosen(llamas):
    table = StitchTable().with_metrics("loss", {"0[0:32]": 2.0, "1[0:40]": 1.0})
    assert table.choose(llamas, "13.1B", keys=[llamas[4].key]).stitch_id == 4


def test_table_round_trip(llamas):
    table = StitchTable(importance=quality(llamas, 1), interval_count=4).with_metrics("loss", quality(llamas, 2))
    table = table.with_metrics("exact_match", {"1[0:40]": 0.5}, decides=True)
    content = table.to_dict(llamas)
    assert StitchTable.from_dict(content) == table
    assert content["space_digest"] == llamas.digest
    assert [row["key"] for row in content["stitches"] if row["published"]] == ["1[0:40]"]
    part = table.to_dict(llamas, ["1[0:40]"])
    assert [row["stitch_id"] for row in part["stitches"]] == [40]
    part = table.to_dict(llamas, ["0[0:32]"])
    assert part["metric"] is None, "exact_match was measured on the largest anchor alone"
    assert StitchTable.from_dict(part).published([llamas["0[0:32]"]]) == ["0[0:32]"]


def test_table_decides_by_the_first_metric_or_the_one_told():
    table = StitchTable().with_metrics("loss_before", {}).with_metrics("loss", {})
    assert table.metric == "loss_before"
    assert table.with_metrics("loss", {}, decides=True).metric == "loss"
    with pytest.raises(ValueError, match="'taste' is unknown.*exact_match"):
        table.with_metrics("taste", {})


@pytest.mark.parametrize(
    "content", [{}, {"stitches": [{}]}, {"stitches": [{"key": "a", "metrics": None}]}, {"stitches": 3}]
)
def test_damaged_table_says_so(content):
    with pytest.raises(ValueError, match="stitches.json is damaged"):
        StitchTable.from_dict(content)
