"""The evidence suite: every setting runs, judgements by hand, rows of another machine or a dead run never count."""

import gc
import importlib
import json
import sys
from dataclasses import fields, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from image_anchors import vit

from stitched_llama.training import StitchTrainingArguments

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*junctions do not fit:UserWarning",
    "ignore:.*ridge decides:UserWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # PEFT's
)


@pytest.fixture
def suite(monkeypatch):
    """The modules of the suite by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("claims", "curves", "evidence", "judgements", "rows", "studies", "tasks")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Untrained anchors of every family, and the digits."""
    folder = tmp_path_factory.mktemp("evidence")
    sys.path.insert(0, str(ROOT / "data"))
    try:
        import make_vits
    finally:
        sys.path.pop(0)
    digits = make_vits.digits(0)
    held_out = {name: digits[name][:80] for name in ("x_test", "y_test")}  # preparing all takes most of a short run
    processor = make_vits.ViTImageProcessor(size={"height": 8, "width": 8})
    anchors = {
        "tiny": lambda: vit(32, 3, size=8),
        "small": lambda: vit(36, 3, size=8),
        "base": lambda: vit(40, 3, size=8),
    }
    named = [("vision-0", anchors, 8)]
    for family, (side, makers) in make_vits.FAMILIES.items():
        if family != "vit":
            source = make_vits.digits_source(digits)
            named.append((f"{family}-0", {name: partial(make, source) for name, make in makers.items()}, side))
    for name, makers, side in named:
        (folder / name).mkdir()
        np.savez(folder / name / "digits.npz", **digits | held_out)
        (folder / name / "anchors.json").write_text("{}")
        processor = make_vits.ViTImageProcessor(size={"height": side, "width": side})
        for number, (anchor, make) in enumerate(makers.items()):
            torch.manual_seed(number)
            make().save_pretrained(folder / name / "anchors" / anchor)
            processor.save_pretrained(folder / name / "anchors" / anchor)
    return folder


def row(suite, name, seed, values, params=None, importance=None, **more):
    """A row of stitches `a`, `b`, ... with these shares right on either half; the first and last are anchors."""
    keys = "abcdefgh"[: len(values)]
    first, second = zip(*[value if isinstance(value, tuple) else (value, value) for value in values])
    stitches = [
        {
            "key": key, "params": (params or range(10, 1000, 10))[i], "anchor": i in (0, len(keys) - 1),
            "importance": (importance or [None] * 8)[i], "gap": False,
        }
        for i, key in enumerate(keys)
    ]  # fmt: skip
    content = {
        "accuracy": {k: (x + y) / 2 for k, x, y in zip(keys, first, second)}, "stitches": stitches,
        "halves": [dict(zip(keys, first)), dict(zip(keys, second))], "half_rows": [100, 100],
        "settings": {"interval_count": 2}, "spearman": 1.0, "trained": 1, **more,
    }  # fmt: skip
    return suite.rows.Row(name, seed, content)


def shape(run):
    """What of a run decides which code it takes; runs that differ in numbers alone are equal in it."""
    words = {name: value for name, value in run.training.items() if isinstance(value, str | bool)}
    plain = {"name": "", "shots": 0, "ridge": 0.0, "lasts": (), "rate_of": "", "adapted": run.adapted is not None}
    return repr(replace(run, training=words, **plain))


def test_every_setting_runs_and_every_claim_is_judged(suite, cache, tmp_path):
    """Each shape of run once, its row standing in for those of equal shape; options and shots of all."""
    runs = {run.name: run for claim in suite.claims.CLAIMS for run in claim.runs()}
    assert runs.keys() == suite.claims.SETTINGS.keys()
    with np.load(cache / "vision-0" / "digits.npz") as digits:
        assert np.bincount(digits["y_train"]).min() >= max(run.shots for run in runs.values())
    rows, done = [], {}
    try:
        for run in sorted(runs.values(), key=lambda run: run.adapted is not None):
            StitchTrainingArguments(output_dir=tmp_path, use_cpu=True, report_to="none", **run.training)
            if shape(run) not in done:
                gc.freeze()  # a run collects garbage several times, which is slow beside all modules and other tests
                done[shape(run)] = json.loads(json.dumps(suite.studies.execute(run, cache, smoke=True)))
            found = done[shape(run)]
            rows.append(suite.rows.Row(run.name, 0, found))
            if run.kind == "stitched":
                assert len(found["accuracy"]) == len(found["stitches"]) > 3
                assert set(found["halves"][0]) == set(found["accuracy"])
    finally:
        gc.unfreeze()
    verdicts = suite.claims.verdicts(suite.claims.CLAIMS, suite.rows.Rows(rows), seeds=1)
    told = {word for v in verdicts for word in v["verdict"].split(" / ")}
    assert told <= {"holds", "does not", "open", "only in part"}
    assert all(v["here"] for v in verdicts)
    suite.rows.Rows(rows).plot(tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_a_dial_is_chosen_on_one_half_and_judged_on_the_other(suite):
    one = row(suite, "default", 0, [(0.1, 0.2), (0.3, 0.1), (0.2, 0.9), (0.4, 0.5)])
    assert one.dial(0) == [("a", 20.0), ("b", 10.0), ("d", 50.0)]
    assert [key for key, _ in one.dial(1)] == ["a", "c"]
    # budgets 10, 13.3, .., 40: half 0 gives a (to 20), b (to 40), d at 40; half 1 gives a (to 30), c after
    wanted = ([20.0] * 3 + [10.0] * 6 + [50.0], [10.0] * 6 + [20.0] * 4)
    assert one.front == pytest.approx(sum(map(sum, wanted)) / 20)


def dial_of(suite, *right):
    """A row whose stitches, ever better on the first half, get these of the second half's rows right."""
    values = [((i + 1) / 10, len(rows) / 100) for i, rows in enumerate(right)]
    bits = [sum(1 << row for row in rows) for rows in right]
    hits = [{}, {key: f"{number:x}" for key, number in zip("abcdefgh", bits)}]
    made = row(suite, "default", 0, values, hits=hits)
    made["hits"][0].update(made["hits"][1])
    return made


def test_a_fall_within_chance_is_told_from_one_beyond_it(suite):
    level = dial_of(suite, range(50), range(5, 52), range(60))  # loses 5 rows, wins 2: p = .23
    assert level.falls(0) == (3, 1, 0)
    deep = dial_of(suite, range(60), range(40), range(60))  # loses 20, wins none: p = 1e-6
    assert deep.falls(0) == (3, 1, 1)
    creeping = dial_of(
        suite, range(60), range(55), range(50), range(45), range(40)
    )  # no step of it tells, the whole does
    assert creeping.falls(0)[2] >= 3
    for dial, verdict in ((level, "holds"), (deep, "does not"), (creeping, "does not")):
        dial.content["halves"][1] = {key: 0.0 for key in dial["halves"][1]} | {
            "a": 1.0
        }  # the other way round: one size
        assert suite.curves.monotone(suite.rows.Rows([dial]))[1] == verdict
    alone = dial_of(suite, range(50))
    assert suite.curves.monotone(suite.rows.Rows([alone]))[1] == "open"  # one size: nothing was compared


def test_the_tail_of_a_coin_by_hand(suite):
    assert suite.rows.binomial_tail(0, 3) == 1
    assert suite.rows.binomial_tail(3, 3) == 1 / 8
    assert suite.rows.binomial_tail(2, 4) == 11 / 16


def test_seeds_that_disagree_leave_a_claim_open(suite):
    rows = [row(suite, "default", seed, [0.1, 0.2, 0.3]) for seed in (0, 1)]
    worse, better = [0.0, 0.1, 0.2], [0.2, 0.3, 0.4]
    for values, verdict in (((worse, worse), "holds"), ((better, better), "does not"), ((worse, better), "open")):
        peers = [row(suite, "peer", seed, v) for seed, v in enumerate(values)]
        assert suite.judgements.better("default", "peer")(suite.rows.Rows(rows + peers))[1] == verdict


def test_where_anchors_alone_are_published_all_sizes_decide(suite):
    """The dial is an anchor's there, and tells nothing of what was compared."""
    anchors_best = [[0.5, 0.3, 0.6], [0.5, 0.1, 0.6]]
    rows = [row(suite, name, seed, v) for name, v in zip(("default", "peer"), anchors_best) for seed in (0, 1)]
    here, verdict = suite.judgements.better("default", "peer")(suite.rows.Rows(rows))
    assert here == "dial 0.0 ± 0.0, all 6.7 ± 0.0 over peer (anchors alone are published)"
    assert verdict == "holds"
    published = [row(suite, "third", seed, [0.3, 0.5, 0.6]) for seed in (0, 1)]
    here, verdict = suite.judgements.better("default", "third")(suite.rows.Rows(rows + published))
    assert "anchors alone" not in here
    assert verdict == "holds"  # the dial does, though the mean of all is not above


def two(suite, name, low, high=None, **more):
    """Two seeds of a setting, of stitches at `low` and the largest at `high`; each value is a share right."""
    values = [[value, value, (high or low)[seed]] for seed, value in enumerate(low)]
    return [
        row(suite, name, seed, v, **{k: x[seed] if isinstance(x, list) else x for k, x in more.items()})
        for seed, v in enumerate(values)
    ]


def judged(judge, suite, *rows):
    return judge(suite.rows.Rows([r for group in rows for r in group]))


def test_least_squares_is_compared_before_training_by_loss(suite):
    own = two(suite, "default", [0.5, 0.6]) + two(suite, "kaiming", [0.4, 0.5])
    low, high = {"loss": {"a": 1.0, "b": 3.0}}, {"loss": {"a": 2.0, "b": 4.0}}
    fitted, drawn = two(suite, "fitted", [0.1, 0.1], **low), two(suite, "drawn", [0.1, 0.1], **high)
    here, verdict = judged(suite.judgements.start, suite, own, fitted, drawn)
    assert here.startswith("before training, loss of all 2.00 ± 0.00 and 3.00 ± 0.00 with kaiming; after it dial 10.0")
    assert verdict == "holds / holds"
    fitted, drawn = two(suite, "fitted", [0.1, 0.1], **high), two(suite, "drawn", [0.1, 0.1], **low)
    assert judged(suite.judgements.start, suite, own, fitted, drawn)[1] == "does not / holds"


def test_a_factor_is_the_mean_of_its_four_pairs(suite):
    """Each setting gives what its levels add."""
    worth = {"PST": 0.3, "one stage": 0.1, "untaught": 0.2}
    rows = [
        r for levels, name in suite.judgements.FACTORS.items()
        for r in two(suite, name, [0.1 + sum(worth.get(level, 0) for level in levels)] * 2)
    ]  # fmt: skip
    for index, (points, verdict) in enumerate([("30.0", "holds"), ("10.0", "holds"), ("-20.0", "does not")]):
        here, found = judged(suite.judgements.factor(index), suite, rows)
        assert here.startswith(f"{points} ± 0.0 on the dial (")
        assert here.count(points) == 10
        assert "anchors alone are published by default, no distillation," in here
        assert found == verdict


def test_a_factor_is_judged_by_all_sizes_where_no_setting_publishes_a_stitch(suite):
    factors = suite.judgements.FACTORS
    judge = suite.judgements.factor(0)
    dips = {levels: [0.5, 0.3 if levels[0] == "PST" else 0.1, 0.6] for levels in factors}
    rows = [row(suite, name, seed, dips[levels]) for levels, name in factors.items() for seed in (0, 1)]
    here, verdict = judged(judge, suite, rows)
    assert here.startswith("0.0 ± 0.0 on the dial (")
    assert verdict == "holds"
    rows[0] = row(suite, "default", 0, [0.5, 0.55, 0.6])
    assert judged(judge, suite, rows)[1] == "open"  # one stitch on a dial: the dial decides


def test_cost_has_quality_over_two_peers_then_memory_then_weights(suite):
    more = {"settings": {"max_steps": 9, "interval_count": 2}, "train_seconds": 1.0}
    rows = [
        two(suite, name, quality, trained=trained, memory_mb=memory, **more)
        for name, quality, trained, memory in (
            ("default", [0.5, 0.5], 10, 90.0), ("esta", [0.1, 0.1], 10, 90.0),
            ("snnet, one stage", [0.4, 0.4], 30, 80.0), ("snnet", [0.6, 0.6], 30, 80.0),
        )
    ]  # fmt: skip
    here, verdict = judged(suite.judgements.cost, suite, *rows)
    assert "snnet: 9 steps, 30 train, 80 ± 0 MB" in here
    assert verdict == "holds / does not / does not / holds"


def test_alike_is_within_two_points_of_the_best_of_a_peers_settings(suite):
    base = two(suite, "default", [0.50, 0.51])
    near, far = two(suite, "near", [0.51, 0.50]), two(suite, "far", [0.9, 0.91])
    low = two(suite, "low", [0.1, 0.2])
    apart = two(suite, "apart", [0.7, 0.4])  # 4.5 points, of seeds that disagree
    alike = suite.judgements.alike
    assert judged(alike("default", ("near", "low")), suite, base, near, low)[1] == "holds"
    assert judged(alike("default", ("low",)), suite, base, low)[1] == "does not"
    assert judged(alike("default", ("far", "near")), suite, base, near, far)[1] == "does not"
    assert judged(alike("default", ("apart",), ("near",)), suite, base, apart, near)[1] == "open / holds"


def test_ascending_compares_neighbours_by_seed(suite):
    one, two_, three = two(suite, "a", [0.1, 0.2]), two(suite, "b", [0.2, 0.3]), two(suite, "c", [0.4, 0.2])
    ascending = suite.judgements.ascending
    assert judged(ascending("a", "b"), suite, one, two_)[1] == "holds"
    assert judged(ascending("b", "a"), suite, one, two_)[1] == "does not"
    assert judged(ascending("a", "b", "c"), suite, one, two_, three)[1] == "holds / open"


def test_angles_are_judged_by_their_mean_and_by_pairs_that_pull_apart(suite):
    def runs(part, mean, above):
        return two(suite, f"angles, {part}", [0.1, 0.1], angles={"mean": mean, "above_90": above})

    here, verdict = judged(suite.judgements.angles, suite, runs("target", 60.0, 0.1), runs("source", 50.0, 0.2))
    assert here == "target 60.0 ± 0.0°, 10 ± 0 % above 90°; source 50.0 ± 0.0°, 20 ± 0 % above 90°"
    assert verdict == "holds / does not"


def test_important_stitches_differ_by_task_more_than_by_draws(suite):
    def runs(name, *scores):
        return [row(suite, name, seed, [0.1, 0.2, 0.3, 0.4], importance=list(s)) for seed, s in enumerate(scores)]

    here, other = (1.0, 2.0, 1.0, 2.0), (2.0, 1.0, 1.0, 2.0)
    differ = suite.judgements.differ("default", "source", "same")
    groups = runs("default", here, here), runs("source", other, other), runs("same", here, here)
    text, verdict = judged(differ, suite, *groups)
    assert text == "another stitch in 50 ± 0 % of the intervals, with other draws in 0 ± 0 %"
    assert verdict == "holds"
    groups = runs("default", here, here), runs("source", here, here), runs("same", other, other)
    assert judged(differ, suite, *groups)[1] == "does not"


def test_gaps_count_the_stitches_across_them_and_their_operations(suite):
    def runs(name, quality, macs):
        made = two(suite, name, quality)
        for one in made:
            for stitch in one["stitches"]:
                stitch |= {"gap": stitch["key"] == "b", "macs": macs}
        return made

    narrow, wide = runs("narrow", [0.5, 0.6], 10), runs("wide", [0.505, 0.605], 20)
    gaps = suite.judgements.gaps
    here, verdict = judged(gaps(("wide", "narrow")), suite, narrow, wide)
    assert here == "wide 55.5 ± 7.1, 0.5 ± 0.0 over narrow at 2.00 times its operations"
    assert verdict == "holds"
    assert judged(gaps(("narrow", "wide")), suite, narrow, wide)[1] == "does not"
    assert judged(gaps(("narrow", "wide"), margin=1, cheaper=True), suite, narrow, wide)[1] == "holds"
    assert judged(gaps(("wide", "narrow"), margin=1, cheaper=True), suite, narrow, wide)[1] == "does not"


def test_equal_time_tells_the_seconds_of_every_stage(suite):
    alone = [suite.rows.Row("alone full", seed, {"train_seconds": 60.0, "run": {"adapted": None}}) for seed in (0, 1)]
    ours = two(suite, "ours", [0.5, 0.5], train_seconds=100.0, run={"adapted": None})
    peer = two(suite, "peer", [0.4, 0.4], train_seconds=41.0, run={"adapted": "alone full"})
    here, verdict = judged(suite.judgements.equal_time(("ours", "peer")), suite, alone, ours, peer)
    assert here == "ours: dial 10.0 ± 0.0, all 10.0 ± 0.0 over peer (anchors alone are published), 100 ± 0 to 101 ± 0 s"
    assert verdict == "holds"


def test_anchors_are_set_beside_their_own_runs(suite):
    """Two anchors, `a` the small one and `c` the large one."""

    def own(name, small, large):
        shares = {"0": small, "1": large}
        content = {"accuracy": shares, "settings": {"max_steps": 900}}
        return [suite.rows.Row(name, seed, content) for seed in (0, 1)]

    run = two(suite, "default", [0.50, 0.54], high=[0.60, 0.64])
    starving = suite.curves.starving("own", "default")
    for small, large, verdict in ((0.54, 0.64, "holds"), (0.56, 0.64, "does not"), (0.54, 0.66, "does not")):
        here, found = judged(starving, suite, run, own("own", small, large))
        assert found == verdict
    assert here == "default: anchor 0 -2.0 ± 2.8, anchor 1 -4.0 ± 2.8"


def test_a_difference_within_chance_is_open_though_every_seed_agrees(suite):
    sign = suite.judgements.sign
    assert sign([1.0, 2.0, 3.0]) == "holds"  # t = 3.46 of 2.92
    assert sign([-1.0, -2.0, -3.0]) == "does not"
    assert sign([0.5, 1.0, 3.0]) == "open"  # t = 1.96
    assert sign([2.0, 2.0]) == "holds"
    assert sign([2.0]) == "open"


def test_a_claim_that_lacks_a_row_of_a_seed_is_not_judged(suite):
    claim = suite.claims.Claim(
        "x", "better", "-", {"default": {}, "peer": {}}, suite.judgements.better("default", "peer")
    )
    values = [[0.2, 0.3, 0.4], [0.1, 0.2, 0.3]]
    rows = [row(suite, name, seed, v) for name, v in zip(("default", "peer"), values) for seed in (0, 1)]
    for there, verdict in ((rows, "holds"), (rows[:-1], "not measured"), (rows[:2], "not measured")):
        (found,) = suite.claims.verdicts([claim], suite.rows.Rows(there), seeds=2)
        assert found["verdict"] == verdict


LOSSES = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}


def test_interpolation_and_importance_by_hand(suite):
    straight = suite.rows.Rows([row(suite, "default", 0, [0.1, 0.2, 0.3, 0.4])])
    here, verdict = suite.curves.interpolate("default")(straight)
    assert "0.0 ± 0.0 off the line" in here
    assert verdict == "holds"
    sagging = suite.rows.Rows([row(suite, "default", 0, [0.1, 0.1, 0.1, 0.4], spearman=0.3)])
    here, verdict = suite.curves.interpolate("default")(sagging)
    assert "-15.0" in here
    assert verdict == "does not"
    ranked = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[1.0, 2.0, 3.0, 4.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([ranked]))
    assert verdict == "holds"
    assert "ranks the other with 1.00 ± 0.00, so that the truth itself would reach 1.00 on all" in here
    assert [suite.curves._ceiling(halves) for halves in (-1.0, 0.0, 1 / 3, 1.0)] == pytest.approx([0, 0, 0.5**0.5, 1])
    late = row(suite, "uniform, longer", 0, [0.1, 0.4, 0.2, 0.3], loss=LOSSES, importance=[1.0, 2.0, 1.0, 2.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([late]))
    assert "50 ± 0 % of its choices lie on the front of the stitches it ranks, of which 50 ± 0 % do" in here
    assert verdict == "holds"
    wrong = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[2.0, 1.0, 4.0, 3.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([wrong]))
    assert verdict == "does not"
    assert "Spearman inside intervals -1.00" in here
    assert "best of its interval 0 ± 0 %; regret 10.0" in here
    undrawn = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[1.0, None, None, 2.0])
    assert suite.curves.importance("uniform, longer")(suite.rows.Rows([undrawn]))[1] == "open"


def test_rows_of_another_version_or_machine_are_refused(suite, tmp_path):
    here = {"versions": {"torch": "2"}, "machine": {"cores": 2}}
    path = tmp_path / "row.json"
    path.write_text(json.dumps(here | {"accuracy": 1}))
    assert suite.evidence.read_row(path, here)["accuracy"] == 1
    named = here | {"machine": {"cores": 2, "model": "A"}}
    assert suite.evidence.read_row(path, named)["accuracy"] == 1  # of before rows said the model
    path.write_text(json.dumps(named))
    with pytest.raises(SystemExit, match="'model': 'A'.*'model': 'B'.*rows of two do not mix"):
        suite.evidence.read_row(path, here | {"machine": {"cores": 2, "model": "B"}})
    for other in ({"versions": {"torch": "3"}}, {"machine": {"cores": 4}}):
        path.write_text(json.dumps(here | other))
        with pytest.raises(SystemExit, match="rows of two do not mix"):
            suite.evidence.read_row(path, here)


def test_another_machine_measures_all_anew_into_a_folder_of_its_own(suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.evidence, "ROOT", tmp_path)
    committed = tmp_path / "benchmarks" / "results" / "evidence-vision"
    here = {"versions": {"torch": "2"}, "machine": {"cores": 2}}
    assert suite.evidence.folder_of(here) == committed
    (committed / "rows").mkdir(parents=True)
    (committed / "rows" / "row.json").write_text(json.dumps(here))
    assert suite.evidence.folder_of(here) == committed
    assert suite.evidence.folder_of(here | {"machine": {"cores": 8}}) == tmp_path / "runs" / "evidence-vision"
    assert "of other versions or another machine: measuring all anew" in capsys.readouterr().err


def test_a_run_that_died_leaves_no_row(suite, cache, tmp_path, monkeypatch):
    run = suite.tasks.Run("broken", 0, space={"kernel_size": 99})
    path = suite.evidence.row_path(tmp_path, run)
    assert path != suite.evidence.row_path(tmp_path, replace(run, seed=1))
    script = tmp_path / "benchmarks" / "studies.py"  # hands what it was given to the test, and dies
    script.parent.mkdir()
    script.write_text(
        "import shutil, sys\nshutil.copy(sys.argv[1], 'wanted.json')\nsys.exit(f'no row in {sys.argv[2]}')"
    )
    monkeypatch.setattr(suite.evidence, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=f"broken, seed 0, died and left no row:\nno row in {path}"):
        suite.evidence.measure(run, tmp_path, cache, smoke=True)
    for name, died in (("broken", True), ("fitted", False)):
        wanted = json.loads((tmp_path / "wanted.json").read_text())
        wanted["run"] |= {"name": name, "kind": "untrained"} | ({} if died else {"space": {}})
        (tmp_path / "wanted.json").write_text(json.dumps(wanted))
        monkeypatch.setattr(sys, "argv", ["studies.py", str(tmp_path / "wanted.json"), str(path)])
        if died:
            with pytest.raises(ValueError, match="kernel_size 99"):
                suite.studies.main()
        else:
            suite.studies.main()
            assert json.loads(path.read_text())["run"]["name"] == name
        assert path.exists() != died


def test_what_is_done_is_read_and_nothing_is_made_for_it(suite, tmp_path, monkeypatch):
    alone, here, done = suite.tasks.Run("alone", 0, kind="alone"), {"versions": {}, "machine": {}}, []
    path = suite.evidence.row_path(tmp_path, alone)
    path.parent.mkdir()
    path.write_text(json.dumps(here))
    monkeypatch.setattr(suite.evidence, "measure", lambda run, place, *_: done.append((run.name, place)) or 0.0)
    monkeypatch.setattr(suite.tasks.Vision, "prepare", lambda cache, family, seed: done.append(f"anchors {seed}"))
    suite.evidence.complete([alone], tmp_path, tmp_path, 1, False, here, needed=set())
    assert done == []  # a fresh clone has the rows, not the tuned anchors
    stitched = [suite.tasks.Run("adapted", seed, adapted="alone") for seed in (0, 1)]
    suite.evidence.row_path(tmp_path, stitched[1]).write_text(json.dumps(here))
    needed = suite.evidence.tuned([alone, *stitched], tmp_path)
    assert needed == {("alone", 0)}  # the other seed's are stitched already
    suite.evidence.complete([alone], tmp_path, tmp_path, 1, False, here, needed)
    assert done == ["anchors 0", ("alone", tmp_path / "again")]  # the row stays as it is


def test_equal_time_counts_every_stage(suite, tmp_path):
    runs = [
        suite.tasks.Run("default", 0), suite.tasks.Run("alone full", 0), suite.tasks.Run("snnet", 0),
        suite.tasks.Run("default, as long as snnet", 0, lasts=("alone full", "snnet"), rate_of="default"),
        suite.tasks.Run("snnet", 1),
    ]  # fmt: skip
    here = {"versions": {}, "machine": {}}
    for run, seconds in zip(runs, (60.0, 70.0, 20.0)):
        path = suite.evidence.row_path(tmp_path, run)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(here | {"train_seconds": seconds, "settings": {"max_steps": 400}}))
    assert suite.evidence.with_steps(runs[0], runs, tmp_path, here) == runs[0]
    assert suite.evidence.with_steps(runs[3], runs, tmp_path, here).training == {"max_steps": 600}


def test_a_claim_asks_for_all_that_its_runs_build_on(suite):
    """Or it could not be measured alone."""
    for claim in suite.claims.CLAIMS:
        runs = claim.runs()
        needed = {name for run in runs for name in (*run.lasts, run.rate_of, run.adapted) if name}
        assert needed <= {run.name for run in runs}, claim.letter


VISION = ROOT / "benchmarks" / "results" / "evidence-vision"


def test_the_published_dial_of_the_measured_runs_never_goes_down(suite):
    """On the committed rows: sizes chosen on one half of the held-out rows, judged on the other."""
    runs = [suite.tasks.Run("default", seed, **suite.claims.SETTINGS["default"]) for seed in (0, 1, 2)]
    rows = [json.loads(suite.evidence.row_path(VISION, run).read_text()) for run in runs]  # no row of other defaults
    found = suite.rows.Rows([suite.rows.Row("default", row["run"]["seed"], row) for row in rows])
    assert suite.curves.monotone(found)[1] == "holds"


def committed(suite):
    """(path, run, row) of every committed row; an option that is gone changed no other run."""
    known = {field.name for field in fields(suite.tasks.Run)}
    for path in (VISION / "rows").glob("*.json"):
        row = json.loads(path.read_text())
        content = {name: value for name, value in row["run"].items() if name in known}
        yield path, suite.tasks.Run(**content | {"lasts": tuple(content["lasts"])}), row


def test_the_committed_table_is_what_the_committed_rows_say(suite):
    own = [suite.rows.Row(run.name, run.seed, row) for _, run, row in committed(suite)]
    record = json.loads((VISION / "evidence.json").read_text())
    found = suite.claims.verdicts(suite.claims.CLAIMS, suite.rows.Rows(own), seeds=3)
    assert found == record["claims"]
    table = suite.evidence.tabulate(found, record["anchors"], suite.evidence.about(own))
    assert (VISION / "table.txt").read_text() == table + "\n"


def test_no_row_is_left_of_a_setting_that_is_gone(suite):
    """Names were given by other processes, so they are the same in every one."""
    seen = 0
    for path, run, _ in committed(suite):
        assert suite.evidence.row_path(VISION, run) == path
        want = json_like(suite.tasks.Run(run.name, run.seed, **suite.claims.SETTINGS[run.name]))
        if run.lasts:  # its steps were reckoned from the seconds of others
            want.training["max_steps"] = run.training["max_steps"]
        assert want == run, path
        seen += 1
    assert seen == 3 * len(suite.claims.SETTINGS)


def json_like(run):
    """As JSON gives it back: lists, not tuples."""
    return replace(run, **{name: json.loads(json.dumps(getattr(run, name))) for name in ("space", "pst", "training")})


def test_every_claim_stands_in_the_papers_table(suite):
    table = (ROOT / "PAPERS.md").read_text().split("## Claims")[1].split("## Where")[0]
    told = {
        letter for line in table.splitlines() for letter in _letters(line.split("|")[1] if line.count("|") > 2 else "")
    }
    assert {claim.letter for claim in suite.claims.CLAIMS} == told


def _letters(cell):
    """ "n1 to n4" and "a, a2" as single letters."""
    for part in cell.replace(",", " ").replace("to n4", "n2 n3 n4").split():
        if part not in ("Letter", "---"):
            yield part


def test_a_rows_name_follows_the_settings(suite, tmp_path, monkeypatch):
    run = suite.tasks.Run("default", 0)
    path = suite.evidence.row_path(tmp_path, run)
    monkeypatch.setattr(suite.tasks.Vision, "steps", 7)
    assert suite.evidence.row_path(tmp_path, run) != path
