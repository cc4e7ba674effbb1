"""The evidence suite: every setting runs, judgements by hand, rows of another machine or a dead run never count."""

import importlib
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import ROOT, python
from image_anchors import vit

from stitched_llama.training import byte_tokenizer, pico_anchor

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
    digits = make_vits.digits(0)
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
        np.savez(folder / name / "digits.npz", **digits)
        (folder / name / "anchors.json").write_text("{}")
        processor = make_vits.ViTImageProcessor(size={"height": side, "width": side})
        for number, (anchor, make) in enumerate(makers.items()):
            torch.manual_seed(number)
            make().save_pretrained(folder / name / "anchors" / anchor)
            processor.save_pretrained(folder / name / "anchors" / anchor)
    for name in ("demo", "language-second", "language-apart"):
        for anchor, (width, depth) in {"small": (48, 3), "large": (64, 4)}.items():
            pico_anchor(width, depth, 2, 2, len(byte_tokenizer())).save_pretrained(folder / name / anchor)
            byte_tokenizer().save_pretrained(folder / name / anchor)
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
        "metric": "accuracy", "accuracy": {k: (x + y) / 2 for k, x, y in zip(keys, first, second)}, "stitches": stitches,
        "halves": [dict(zip(keys, first)), dict(zip(keys, second))], "half_rows": [100, 100],
        "settings": {"interval_count": 2}, "spearman": 1.0, "trained": 1, **more,
    }  # fmt: skip
    return suite.rows.Row(name, seed, content)


@pytest.mark.parametrize("task", ["vision", "language"])
def test_every_setting_runs_and_every_claim_is_judged(task, suite, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(suite.tasks, "DEMO", cache / "demo")
    suite.tasks.Language.prepare(cache, "", 0)
    own = [claim for claim in suite.claims.CLAIMS if task in claim.tasks]
    settings = {run.name: run for claim in own for run in claim.runs(task)}
    rows = []
    for run in sorted(settings.values(), key=lambda run: run.adapted is not None):
        found = suite.studies.execute(replace(run, training={**run.training, "max_steps": 2}), cache, smoke=True)
        found = json.loads(json.dumps(found))
        rows.append(suite.rows.Row(run.name, 0, found))
        if run.kind == "stitched":
            assert len(found[found["metric"]]) == len(found["stitches"]) > 3
            assert set(found["halves"][0]) == set(found[found["metric"]])
    verdicts = suite.claims.verdicts(own, suite.rows.Rows(rows), task, seeds=1)
    told = {word for v in verdicts for word in v["verdict"].split(" / ")}
    assert told <= {"holds", "does not", "open", "only in part", "only if"}
    assert all(v["here"] for v in verdicts)
    suite.rows.Rows(rows).plot(tmp_path / "p.png", task)
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
        assert suite.curves.monotone(suite.rows.Rows([dial]), "vision")[1] == verdict
    alone = dial_of(suite, range(50))
    assert suite.curves.monotone(suite.rows.Rows([alone]), "vision")[1] == "open"  # one size: nothing was compared


def test_the_tail_of_a_coin_by_hand(suite):
    assert suite.rows.binomial_tail(0, 3) == 1
    assert suite.rows.binomial_tail(3, 3) == 1 / 8
    assert suite.rows.binomial_tail(2, 4) == 11 / 16


def test_seeds_that_disagree_leave_a_claim_open(suite):
    rows = [row(suite, "default", seed, [0.1, 0.2, 0.3]) for seed in (0, 1)]
    worse, better = [0.0, 0.1, 0.2], [0.2, 0.3, 0.4]
    for values, verdict in (((worse, worse), "holds"), ((better, better), "does not"), ((worse, better), "open")):
        peers = [row(suite, "peer", seed, v) for seed, v in enumerate(values)]
        assert suite.judgements.better("default", "peer")(suite.rows.Rows(rows + peers), "vision")[1] == verdict


def test_a_difference_within_chance_is_open_though_every_seed_agrees(suite):
    sign = suite.judgements.sign
    assert sign([1.0, 2.0, 3.0]) == "holds"  # t = 3.46 of 2.92
    assert sign([-1.0, -2.0, -3.0]) == "does not"
    assert sign([0.5, 1.0, 3.0]) == "open"  # t = 1.96
    assert sign([2.0, 2.0]) == "holds"
    assert sign([2.0]) == "open"


def test_a_claim_that_lacks_a_row_of_a_seed_is_not_judged(suite):
    claim = suite.claims.Claim(
        "x", "better", "-", lambda task: {"default": {}, "peer": {}}, suite.judgements.better("default", "peer")
    )
    values = [[0.2, 0.3, 0.4], [0.1, 0.2, 0.3]]
    rows = [row(suite, name, seed, v) for name, v in zip(("default", "peer"), values) for seed in (0, 1)]
    for there, verdict in ((rows, "holds"), (rows[:-1], "not measured"), (rows[:2], "not measured")):
        (found,) = suite.claims.verdicts([claim], suite.rows.Rows(there), "vision", seeds=2)
        assert found["verdict"] == verdict


LOSSES = {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}


def test_a_claim_asked_again_never_just_holds(suite):
    rows = suite.rows.Rows([row(suite, "default", 0, [0.1])])
    for judged, verdict in (("holds", "only if"), ("does not", "does not"), ("open", "open")):
        settings = suite.claims._settings("default")
        claim = suite.claims.Claim("x", "", "", settings, lambda *_, judged=judged: ("1", judged), only_if="longer")
        (found,) = suite.claims.verdicts([claim], rows, "vision", seeds=1)
        assert found["verdict"] == verdict
        assert ("Only if: longer" in found["here"]) == (verdict == "only if")


def test_interpolation_and_importance_by_hand(suite):
    straight = suite.rows.Rows([row(suite, "default", 0, [0.1, 0.2, 0.3, 0.4])])
    here, verdict = suite.curves.interpolate("default")(straight, "vision")
    assert "0.0 ± 0.0 off the line" in here
    assert verdict == "holds"
    sagging = suite.rows.Rows([row(suite, "default", 0, [0.1, 0.1, 0.1, 0.4], spearman=0.3)])
    here, verdict = suite.curves.interpolate("default")(sagging, "vision")
    assert "-15.0" in here
    assert verdict == "does not"
    ranked = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[1.0, 2.0, 3.0, 4.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([ranked]), "vision")
    assert verdict == "holds"
    assert "ranks the other with 1.00 ± 0.00, so that the truth itself would reach 1.00 on all" in here
    assert [suite.curves._ceiling(halves) for halves in (-1.0, 0.0, 1 / 3, 1.0)] == pytest.approx([0, 0, 0.5**0.5, 1])
    late = row(suite, "uniform, longer", 0, [0.1, 0.4, 0.2, 0.3], loss=LOSSES, importance=[1.0, 2.0, 1.0, 2.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([late]), "vision")
    assert "50 ± 0 % of its choices lie on the front of the stitches it ranks, of which 50 ± 0 % do" in here
    assert verdict == "holds"
    wrong = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[2.0, 1.0, 4.0, 3.0])
    here, verdict = suite.curves.importance("uniform, longer")(suite.rows.Rows([wrong]), "vision")
    assert verdict == "does not"
    assert "Spearman inside intervals -1.00" in here
    assert "best of its interval 0 ± 0 %; regret 10.0" in here
    undrawn = row(suite, "uniform, longer", 0, [0.1, 0.2, 0.3, 0.4], loss=LOSSES, importance=[1.0, None, None, 2.0])
    assert suite.curves.importance("uniform, longer")(suite.rows.Rows([undrawn]), "vision")[1] == "open"


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
    assert suite.evidence.folder_of("vision", here) == committed
    (committed / "rows").mkdir(parents=True)
    (committed / "rows" / "row.json").write_text(json.dumps(here))
    assert suite.evidence.folder_of("vision", here) == committed
    assert suite.evidence.folder_of("vision", here | {"machine": {"cores": 8}}) == tmp_path / "runs" / "evidence-vision"
    assert "of other versions or another machine: measuring all anew" in capsys.readouterr().err


def test_a_run_that_died_leaves_no_row(suite, cache, tmp_path):
    run = suite.tasks.Run("vision", "broken", 0, space={"kernel_size": 99})
    with pytest.raises(SystemExit, match="broken, seed 0, died and left no row:(.|\n)*kernel_size 99"):
        suite.evidence.measure(run, tmp_path, cache, smoke=True)
    assert not suite.evidence.row_path(tmp_path, run).exists()
    assert suite.evidence.row_path(tmp_path, run) != suite.evidence.row_path(tmp_path, replace(run, seed=1))


def test_what_is_done_is_read_and_nothing_is_made_for_it(suite, tmp_path, monkeypatch):
    alone, here, done = suite.tasks.Run("vision", "alone", 0, kind="alone"), {"versions": {}, "machine": {}}, []
    path = suite.evidence.row_path(tmp_path, alone)
    path.parent.mkdir()
    path.write_text(json.dumps(here))
    monkeypatch.setattr(suite.evidence, "measure", lambda run, place, *_: done.append((run.name, place)) or 0.0)
    monkeypatch.setattr(suite.tasks.Vision, "prepare", lambda cache, family, seed: done.append(f"anchors {seed}"))
    suite.evidence.complete([alone], tmp_path, tmp_path, 1, False, here, needed=set())
    assert done == []  # a fresh clone has the rows, not the tuned anchors
    stitched = [suite.tasks.Run("vision", "adapted", seed, adapted="alone") for seed in (0, 1)]
    suite.evidence.row_path(tmp_path, stitched[1]).write_text(json.dumps(here))
    needed = suite.evidence.tuned([alone, *stitched], tmp_path)
    assert needed == {("alone", 0)}  # the other seed's are stitched already
    suite.evidence.complete([alone], tmp_path, tmp_path, 1, False, here, needed)
    assert done == ["anchors 0", ("alone", tmp_path / "again")]  # the row stays as it is


def test_every_language_family_has_its_skills(suite, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(suite.tasks, "_python", lambda script, *_, output: made.append(output.name) or output.mkdir())
    for family in ("apart", "second", "", "apart"):
        suite.tasks.Language.prepare(tmp_path, family, 0)
    assert made == ["skills", "language-apart", "language-second"]


def test_equal_time_counts_every_stage(suite, tmp_path):
    runs = [
        suite.tasks.Run("vision", "default", 0), suite.tasks.Run("vision", "alone full", 0), suite.tasks.Run("vision", "snnet", 0),
        suite.tasks.Run("vision", "default, as long as snnet", 0, lasts=("alone full", "snnet"), rate_of="default"),
        suite.tasks.Run("vision", "snnet", 1),
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
        for task in claim.tasks:
            runs = claim.runs(task)
            needed = {name for run in runs for name in (*run.lasts, run.rate_of, run.adapted) if name}
            assert needed <= {run.name for run in runs}, (claim.letter, task)


@pytest.mark.parametrize("task", ["vision", "language"])
def test_the_published_dial_of_the_measured_runs_never_goes_down(task, suite):
    """On the committed rows: sizes chosen on one half of the held-out rows, judged on the other."""
    folder, settings = (
        ROOT / "benchmarks" / "results" / f"evidence-{task}",
        suite.claims.CLAIMS[0].settings(task)["default"],
    )
    runs = [suite.tasks.Run(task, "default", seed, **settings) for seed in (0, 1, 2)]
    rows = [json.loads(suite.evidence.row_path(folder, run).read_text()) for run in runs]  # no row of other defaults
    found = suite.rows.Rows([suite.rows.Row("default", row["run"]["seed"], row) for row in rows])
    assert suite.curves.monotone(found, task)[1] != "does not", suite.curves.monotone(found, task)


@pytest.mark.parametrize("task", ["vision", "language"])
def test_no_row_is_left_of_a_setting_that_is_gone(task, suite):
    folder = ROOT / "benchmarks" / "results" / f"evidence-{task}"
    names = {name for claim in suite.claims.CLAIMS if task in claim.tasks for name in claim.settings(task)}
    for path in (folder / "rows").glob("*.json"):
        run = json.loads(path.read_text())["run"]
        assert run["name"] in names
        assert suite.evidence.row_path(folder, suite.tasks.Run(**run | {"lasts": tuple(run["lasts"])})) == path


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


def test_a_rows_name_is_the_same_in_every_process_and_follows_the_settings(suite, tmp_path, monkeypatch):
    run = suite.tasks.Run("vision", "default", 0)
    path = suite.evidence.row_path(tmp_path, run)
    code = f"import evidence, tasks; from pathlib import Path; print(evidence.row_path(Path({str(tmp_path)!r}), tasks.Run('vision', 'default', 0)))"
    done = python("-c", code, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.stdout.strip() == str(path)
    monkeypatch.setattr(suite.tasks.Vision, "steps", 7)
    assert suite.evidence.row_path(tmp_path, run) != path
