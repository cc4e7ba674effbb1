"""The papers' claims, measured at demo scale: `make evidence`, or

    python benchmarks/evidence.py [--seeds 0 1 2] [--only a c] [--workers 2]

Peers, in the same run: each setting beside this package's default, anchors tuned alone by plain PEFT, SN-Net's procedure. Runs are
independent processes of one thread each; a run that is done is read again, unless another version or machine wrote it: that is
refused, and where the committed rows are of another all is measured anew into `runs/evidence-vision`. Writes `rows/` and, of all
claims, `evidence.json`, `table.txt` and `curves.png`; prints the table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, Field, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from claims import CLAIMS, verdicts
from rows import Row, Rows
from studies import adapted_folder
from tasks import ROOT, Run, Vision

from stitched_llama import StitchTrainingArguments
from stitched_llama.bundles import write_atomically
from stitched_llama.training import dump_record, provenance


def row_path(output: Path, run: Run) -> Path:
    """Where a run's row lies; the name changes with anything that decides what the run does, and does not depend on options left
    alone: a new one leaves the rows there are."""
    own = set(StitchTrainingArguments.__annotations__) - {"anchors_first"}  # for a second LoRA, which no run has
    ours = {f.name: f.default for f in fields(StitchTrainingArguments) if f.name in own and f.default is not MISSING}
    unlike = {f.name: getattr(run, f.name) for f in fields(run) if getattr(run, f.name) != _default(f)}
    decided = [unlike, Vision.steps, Vision.training, Vision.full_rate, Vision.ranks[run.family], ours]
    content = json.dumps(decided, sort_keys=True)
    name = run.name.replace(", ", "-").replace(" ", "-")
    return output / "rows" / f"{name}-{run.seed}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def folder_of(here: dict[str, Any]) -> Path:
    """The committed results; a folder of one's own where other versions or another machine measured those."""
    committed, own = ROOT / "benchmarks" / "results" / "evidence-vision", ROOT / "runs" / "evidence-vision"
    row = next((committed / "rows").glob("*.json"), None)
    if row is None or not _unlike(json.loads(row.read_text()), here):
        return committed
    print(f"{committed} is of other versions or another machine: measuring all anew into {own}", file=sys.stderr)
    return own


def _unlike(row: dict[str, Any], here: dict[str, Any]) -> str | None:
    """Whether versions or machine differ; a row that does not tell something of its machine counts as equal in it."""
    told = row | {"machine": {name: row["machine"].get(name, value) for name, value in here["machine"].items()}}
    return next((name for name in ("versions", "machine") if told[name] != here[name]), None)


def read_row(path: Path, here: dict[str, Any]) -> dict[str, Any]:
    """A row that is done.

    Raises:
        SystemExit: other versions or another machine wrote it; names both and the way out.
    """
    row = json.loads(path.read_text())
    if name := _unlike(row, here):
        raise SystemExit(
            f"{path} was measured with {name} {row[name]}, here are {here[name]}: rows of two do not mix; move the folder "
            "away, or pass another --output"
        )
    return row


def measure(run: Run, output: Path, cache: Path, smoke: bool) -> float:
    """Does a run in a process of its own; returns its seconds."""
    path, start = row_path(output, run), time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = cache / f"{path.stem}.wanted.json"
    wanted.write_text(json.dumps({"run": asdict(run), "cache": str(cache), "smoke": smoke}))
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "studies.py"), str(wanted), str(path)]
    done = subprocess.run(command, env=os.environ | threads, cwd=ROOT, capture_output=True, text=True)
    wanted.unlink()
    if done.returncode:
        raise SystemExit(f"{run.name}, seed {run.seed}, died and left no row:\n{done.stderr[-2000:]}")
    return time.monotonic() - start


def complete(runs: list[Run], output: Path, cache: Path, workers: int, smoke: bool, here: dict, needed: set) -> None:
    """Does what is not done yet, and makes the anchors that takes. A run that is done but left no anchors that one to come needs
    is done again for these alone: its row stays, as steps of other rows follow from its seconds."""

    def left(run: Run) -> bool:
        return adapted_folder(cache, run.name, run.seed, smoke).is_dir()

    missing = []
    for run in runs:
        if not row_path(output, run).is_file():
            missing.append((run, output))
            continue
        read_row(row_path(output, run), here)
        if (run.name, run.seed) in needed and not left(run):
            missing.append((run, cache / "again"))
    anchors = {(run.family, run.seed) for run, _ in missing}
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda made: Vision.prepare(cache, *made), sorted(anchors)))
        measured = pool.map(lambda one: measure(*one, cache, smoke), missing)
        for number, ((run, _), seconds) in enumerate(zip(missing, measured), 1):
            print(f"{number}/{len(missing)} {run.name}, seed {run.seed}: {seconds:.0f} s", flush=True)


def tuned(runs: list[Run], output: Path) -> set[tuple[str, int]]:
    """Names and seeds of the runs whose anchors are still to be stitched."""
    return {(run.adapted, run.seed) for run in runs if run.adapted and not row_path(output, run).is_file()}


def with_steps(run: Run, runs: list[Run], output: Path, here: dict) -> Run:
    """A run that is to last as long as others of its seed, with the steps that fit, all stages counted."""
    if not run.lasts:
        return run
    paths = {r.name: row_path(output, r) for r in runs if r.seed == run.seed and not r.lasts}
    if not all(paths[name].is_file() for name in (*run.lasts, run.rate_of)):
        return run  # asked with `--no_run` only: there is no row of it either
    rows = {name: read_row(paths[name], here) for name in (*run.lasts, run.rate_of)}
    seconds = sum(rows[name]["train_seconds"] for name in run.lasts)
    peer = rows[run.rate_of]
    steps = max(1, round(peer["settings"]["max_steps"] * seconds / peer["train_seconds"]))
    return replace(run, training={**run.training, "max_steps": steps})


def about(rows: list[Row]) -> str:
    """Which code and machine measured the rows."""
    commits = sorted({str(row["commit"])[:7] for row in rows})
    unnamed = sum("model" not in row["machine"] for row in rows)
    return f"{len(rows)} rows of the commits {' '.join(commits)}; {unnamed} of them do not say the processor's model"


def tabulate(found: list[dict[str, str]], made: dict[str, str], head: str) -> str:
    """The table as text: anchors first, then a paragraph of columns for each claim."""
    widths = {"letter": 3, "claim": 32, "paper": 24, "here": 76, "verdict": 12}
    lines = [f"Trained: {text}" if name == "trained" else f"Anchors of {name}: {text}" for name, text in made.items()]
    lines += [*textwrap.wrap(head, 150), "One claim alone: python benchmarks/evidence.py --only LETTER", ""]
    for row in [{"letter": "", **{name: name for name in list(widths)[1:]}}, *found]:
        cells = [textwrap.wrap(row[name], width) or [""] for name, width in widths.items()]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(f"{part:<{width}}" for part, width in zip(parts, widths.values())).rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the papers' claims at demo scale.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="claims by letter; all by default")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/evidence-vision, where this machine measured that"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "evidence", help="anchors and adapted anchors")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--no_run", action="store_true", help="judge the rows there are; other claims are not measured")
    parser.add_argument("--smoke", action="store_true", help="six steps a run: does it run, not what it finds")
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    claims = [claim for claim in CLAIMS if claim.letter in (options.only or claim.letter)]
    if not claims:
        raise SystemExit(f"no claim is called {options.only}; there are {', '.join(c.letter for c in CLAIMS)}")
    settings = {run.name: run for claim in claims for run in claim.runs()}
    runs = [replace(run, seed=seed) for run in settings.values() for seed in options.seeds]
    torch.set_num_threads(1)  # as every run has it
    here = provenance()
    smoke = cache / "smoke" / "evidence-vision"
    output = options.output or (smoke if options.smoke else folder_of(here))
    stages = [
        lambda run: not run.adapted and not run.lasts,
        lambda run: run.adapted and not run.lasts,
        lambda run: run.lasts,
    ]
    needed = tuned(runs, output)
    done: list[Run] = []
    for stage in stages:  # each needs what the one before it left
        now = [with_steps(run, runs, output, here) for run in runs if stage(run)]
        if not options.no_run:
            complete(now, output, cache, options.workers, options.smoke, here, needed)
        done += now
    runs = [run for run in done if row_path(output, run).is_file()]

    rows = Rows([Row(run.name, run.seed, read_row(row_path(output, run), here)) for run in runs])
    found = verdicts(claims, rows, len(options.seeds))
    made = {family or "vision": Vision.made[family] for family in {run.family: None for run in runs}}
    made["trained"] = Vision.trained
    table = tabulate(found, made, about(rows.rows))
    print(table)
    command = f"python benchmarks/evidence.py --seeds {' '.join(map(str, options.seeds))}"
    command += " --no_run" * options.no_run
    if options.only:
        command += f" --only {' '.join(options.only)}"
    seconds = sum(row["train_seconds"] + row.content.get("evaluation_seconds", 0) for row in rows.rows)
    record = here | {
        "command": command,
        "seconds_of_one_thread": round(seconds),
        "seeds": options.seeds,
        "anchors": made,
        "commits_of_the_rows": sorted({str(row.content["commit"]) for row in rows.rows}),
        "claims": found,
    }
    if not options.only:
        write_atomically(output / "table.txt", lambda path: Path(path).write_text(table + "\n"))
        write_atomically(output / "evidence.json", lambda path: Path(path).write_text(dump_record(record)))
        rows.plot(output / "curves.png")
    print(json.dumps(json.loads(dump_record(record))))


if __name__ == "__main__":
    main()
