"""The evidence suite: every setting runs, judgements by hand, rows of another machine or a dead run never count."""

import json
from dataclasses import replace

import pytest
from conftest import ROOT
from image_anchors import vit

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*junctions do not fit:UserWarning",
    "ignore:.*ridge decides:UserWarning",
    "ignore:.*is_gradient_checkpointing:FutureWarning",  # PEFT's
)


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims
    import evidence
    import judgements
    import studies

    return claims, evidence, judgements, studies


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Untrained ViTs in the place of the vision family, and the skills of the language task."""
    import sys

    import numpy as np
    import torch

    folder = tmp_path_factory.mktemp("evidence")
    sys.path.insert(0, str(ROOT / "data"))
    try:
        import make_vits
    finally:
        sys.path.pop(0)
    family = folder / "vision-0"
    family.mkdir()
    np.savez(family / "digits.npz", **make_vits.digits(0))
    for name, width in (("tiny", 32), ("small", 36), ("base", 40)):
        torch.manual_seed(width)
        vit(width, 3, size=8).save_pretrained(family / "anchors" / name)
        make_vits.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(family / "anchors" / name)
    (family / "anchors.json").write_text("{}")
    return folder


def row(judgements, name, seed, values, params=None, importance=None, **more):
    """A row of stitches `a`, `b`, ... with these shares right on either half; the first and last are anchors."""
    keys = "abcdefgh"[: len(values)]
    first, second = zip(*[value if isinstance(value, tuple) else (value, value) for value in values])
    stitches = [
        {
            "key": key, "params": (params or range(10, 1000, 10))[i], "anchor": i in (0, len(keys) - 1),
            "importance": (importance or [None] * 8)[i],
        }
        for i, key in enumerate(keys)
    ]  # fmt: skip
    content = {
        "metric": "accuracy", "accuracy": {k: (x + y) / 2 for k, x, y in zip(keys, first, second)}, "stitches": stitches,
        "halves": [dict(zip(keys, first)), dict(zip(keys, second))], "half_rows": [100, 100],
        "settings": {"interval_count": 2}, "spearman": 1.0, **more,
    }  # fmt: skip
    return judgements.Row(name, seed, content)


def test_every_setting_of_vision_runs_and_every_claim_is_judged(suite, cache, tmp_path):
    claims, evidence, judgements, studies = suite
    own = [claim for claim in claims.CLAIMS if "vision" in claim.tasks]
    settings = {run.name: run for claim in own for run in claim.runs("vision")}
    rows = []
    for run in sorted(settings.values(), key=lambda run: run.adapted is not None):
        short = {"max_steps": 2, **{k: v for k, v in run.training.items() if k != "equal_time_of"}}
        found = studies.execute(replace(run, training=short), cache, smoke=True)
        found = json.loads(json.dumps(found))
        rows.append(judgements.Row(run.name, 0, found))
        if run.kind == "stitched":
            assert len(found["accuracy"]) == len(found["stitches"]) > 3
            assert set(found["halves"][0]) == set(found["accuracy"])
    verdicts = claims.verdicts(own, judgements.Rows(rows), "vision")
    assert {v["verdict"].split(" / ")[0] for v in verdicts} <= {"holds", "does not", "open", "only in part"}
    assert all(v["here"] for v in verdicts)
    judgements.Rows(rows).plot(tmp_path / "p.png", "vision")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_language_runs_too(suite, cache):
    _, _, _, studies = suite
    studies.Language.prepare(cache, 0)
    run = studies.Run("language", "default", 0, before=True, training={"max_steps": 1})
    found = studies.execute(run, cache, smoke=True)
    assert set(found["before"]) == set(found["exact_match"])


def test_a_dial_is_chosen_on_one_half_and_judged_on_the_other(suite):
    _, _, judgements, _ = suite
    one = row(judgements, "default", 0, [(0.1, 0.2), (0.3, 0.1), (0.2, 0.9), (0.4, 0.5)])
    assert one.dial(0) == [("a", 20.0), ("b", 10.0), ("d", 50.0)]
    assert [key for key, _ in one.dial(1)] == ["a", "c"]
    # budgets 10, 13.3, .., 40: half 0 gives a (to 20), b (to 40), d at 40; half 1 gives a (to 30), c after
    wanted = ([20.0] * 3 + [10.0] * 6 + [50.0], [10.0] * 6 + [20.0] * 4)
    assert one.front == pytest.approx(sum(map(sum, wanted)) / 20)


def test_a_fall_within_chance_is_told_from_one_beyond_it(suite):
    _, _, judgements, _ = suite
    assert judgements.margin(50, 50, 100) == pytest.approx(13.86, abs=0.01)
    slight = judgements.Rows([row(judgements, "default", 0, [(0.1, 0.50), (0.2, 0.45), (0.3, 0.6)])])
    assert judgements.monotone(slight, "vision") == ("1 of 3 steps fall, 0 of them by more than chance", "holds")
    deep = judgements.Rows([row(judgements, "default", 0, [(0.1, 0.9), (0.2, 0.3), (0.3, 0.95)])])
    assert judgements.monotone(deep, "vision") == ("1 of 3 steps fall, 1 of them by more than chance", "does not")


def test_seeds_that_disagree_leave_a_claim_open(suite):
    _, _, judgements, _ = suite
    rows = [row(judgements, "default", seed, [0.1, 0.2, 0.3]) for seed in (0, 1)]
    worse, better = [0.0, 0.1, 0.2], [0.2, 0.3, 0.4]
    for values, verdict in (((worse, worse), "holds"), ((better, better), "does not"), ((worse, better), "open")):
        peers = [row(judgements, "peer", seed, v) for seed, v in enumerate(values)]
        assert judgements.better("default", "peer")(judgements.Rows(rows + peers), "vision")[1] == verdict


def test_interpolation_and_importance_by_hand(suite):
    _, _, judgements, _ = suite
    straight = judgements.Rows([row(judgements, "default", 0, [0.1, 0.2, 0.3, 0.4])])
    here, verdict = judgements.interpolates(straight, "vision")
    assert "0.0 ± 0.0 off the line" in here
    assert verdict == "holds"
    sagging = judgements.Rows([row(judgements, "default", 0, [0.1, 0.1, 0.1, 0.4], spearman=0.3)])
    assert "-15.0" in judgements.interpolates(sagging, "vision")[0]
    assert judgements.interpolates(sagging, "vision")[1] == "does not"
    ranked = row(judgements, "uniform", 0, [0.1, 0.2, 0.3, 0.4], importance=[1.0, 2.0, 3.0, 4.0])
    assert judgements.importance(judgements.Rows([ranked]), "vision")[1] == "holds"
    wrong = row(judgements, "uniform", 0, [0.1, 0.2, 0.3, 0.4], importance=[2.0, 1.0, 4.0, 3.0])
    assert judgements.importance(judgements.Rows([wrong]), "vision")[1] == "does not"


def test_rows_of_another_version_or_machine_are_refused(suite, tmp_path):
    _, evidence, _, _ = suite
    here = {"versions": {"torch": "2"}, "machine": {"cores": 2}}
    path = tmp_path / "row.json"
    path.write_text(json.dumps(here | {"accuracy": 1}))
    assert evidence.read_row(path, here)["accuracy"] == 1
    for other in ({"versions": {"torch": "3"}}, {"machine": {"cores": 4}}):
        path.write_text(json.dumps(here | other))
        with pytest.raises(SystemExit, match="rows of two do not mix"):
            evidence.read_row(path, here)


def test_a_run_that_died_leaves_no_row(suite, cache, tmp_path):
    _, evidence, _, studies = suite
    run = studies.Run("vision", "broken", 0, space={"kernel_size": 99})
    with pytest.raises(SystemExit, match="broken, seed 0, died and left no row:(.|\n)*kernel_size 99"):
        evidence.measure(run, tmp_path, cache, smoke=True)
    assert not evidence.row_path(tmp_path, run).exists()
    assert evidence.row_path(tmp_path, run) != evidence.row_path(tmp_path, replace(run, seed=1))


def test_equal_time_scales_the_steps(suite, tmp_path):
    _, evidence, _, studies = suite
    runs = [
        studies.Run("vision", "default", 0), studies.Run("vision", "snnet", 0),
        studies.Run("vision", "snnet, equal time", 0, training={"sampling": "uniform", "equal_time_of": "snnet"}),
    ]  # fmt: skip
    here = {"versions": {}, "machine": {}}
    for run, seconds in zip(runs, (60.0, 40.0)):
        path = evidence.row_path(tmp_path, run)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(here | {"train_seconds": seconds, "settings": {"max_steps": 600}}))
    found = evidence.in_equal_time(runs, tmp_path, here)
    assert found[:2] == runs[:2]
    assert found[2].training == {"sampling": "uniform", "max_steps": 900}
