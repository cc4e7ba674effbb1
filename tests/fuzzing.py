"""What the short fuzz test and `make fuzz` share: one case, its outcome, and values and edits that files get.

A module `fuzzing_NAME` brings `cases(rng)`, an endless iterator of `(name, mutate, check)`, and `prepare(folder)`, which
builds once what the cases begin with. `mutate(case)` changes a copy of that; `check(case)` returns where the outcome is
right and raises `Different` where it is silently another. `FULL` says how many `make fuzz` runs. A module of several kinds
has `KINDS` instead: name -> (prepare, cases, how many).

Right, or refused by a ValueError or an OSError, is allowed; everything else is a fault.
"""

import builtins
import contextlib
import copy
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

CPU_SECONDS, WALL_SECONDS, MORE_MEMORY = 10, 120, 1 << 30
FAULTS = ("different", "exception", "hang", "memory", "code run", "files outside", "raw control characters")
MARKER = "CODE_WAS_RUN"  # what code that a case brings writes, beside the case's folder


class Different(AssertionError):
    """Nothing was said, and what came out is not what was saved."""


class Fault(BaseException):
    """What no handler of a library may catch."""


def kinds(names=None, short=False):
    """Name of a kind of cases -> (prepare, cases, how many), of every module `fuzzing_*` beside this one; `short` leaves out those
    whose cases take seconds (`SHORT = False`).
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("fuzzing_*.py")):
        module = importlib.import_module(path.stem)
        if short and not getattr(module, "SHORT", True):
            continue
        name = path.stem.removeprefix("fuzzing_")
        found |= module.KINDS if hasattr(module, "KINDS") else {name: (module.prepare, module.cases, module.FULL)}
    return found if names is None else {name: found[name] for name in names}


def outcome_of(original, folder, mutate, check):
    """(`"right"`, `"refused"` or one of `FAULTS`, detail) of one case, run on a copy of `original` in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    case = shutil.copytree(original, folder / "case", symlinks=True)
    mutate(case)
    outside, memory = _listing(folder, case), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, detail = "right", ""
    try:
        with _watched(folder):
            check(case)
    except Fault as fault:
        outcome, _, detail = str(fault).partition(": ")
    except Different as error:
        outcome, detail = "different", str(error)
    except (ValueError, OSError) as error:
        outcome, detail = "refused", str(error)
    except Exception as error:
        lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-4:]]
        outcome, detail = "exception", f"{type(error).__name__}: {error} at {', '.join(lines)}"
    if (folder / MARKER).exists():
        return "code run", detail
    if _listing(folder, case) != outside:
        return "files outside", detail
    if 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) > MORE_MEMORY:
        return "memory", detail
    return outcome, detail


def _listing(folder, case):
    """Everything beside the bundle of a case: what no load or save may change."""
    own = case / "bundle"
    paths = [path for path in sorted(folder.rglob("*")) if own not in (path, *path.parents)]
    return [(str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in paths if p.is_symlink() or p.is_file()]


@contextlib.contextmanager
def _watched(folder):
    """No case may ask a person anything, or take ten seconds of this process."""

    def asked(*args):
        raise Fault(f"code run: asked {args}")

    def late(signum, frame):
        raise Fault(f"hang: in {frame.f_code.co_qualname} of {frame.f_code.co_filename}:{frame.f_lineno}")

    before, handlers = builtins.input, {s: signal.signal(s, late) for s in (signal.SIGPROF, signal.SIGALRM)}
    builtins.input, os.environ["FUZZ_FOLDER"] = asked, str(folder)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        builtins.input = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(name, prepare, cases, seeds, root, report=None):
    """Runs one case a seed; counts of outcomes, and every fault with its seed."""
    import random

    prepare(original := root / name)
    counts, faults, start = {}, [], time.time()
    for seed in seeds:
        title, mutate, check = next(iter(cases(random.Random(seed))))
        outcome, detail = outcome_of(original, root / "work", mutate, check)
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome in FAULTS:
            faults.append({"seed": seed, "case": title, "outcome": outcome, "detail": detail[:600]})
            print(f"{name} {seed} {title}: {outcome}: {detail[:600]!r}", file=sys.stderr)
        if report is not None:
            report(seed, title, outcome, detail)
    return {"cases": sum(counts.values()), **counts, "seconds": round(time.time() - start, 1), "faults": faults}


# ---- values and edits

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 7, 20_000, 10**8, 10**9, 10**18, 10**400, 0.0, -1.5, 1e-300, 1e308, float("nan"),
    float("inf"), "", "x", "1", "\x1b[31mred\x07", "\ud800", "../../etc/passwd", "a" * 100_000, [], [1], [None], [[1]],
    ["x"] * 1000, {}, {"x": 1}, {"": None}, {"__float__": "Infinity"},
)  # fmt: skip


def places(content, path=()):
    """Paths of all values in a tree of JSON."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def edited(content, rng, extra=()):
    """A copy of a tree of JSON with one value replaced, removed, doubled or swapped, or one of `extra` set; and what was done."""
    content = copy.deepcopy(content)
    paths = list(places(content))
    if not paths:  # all of it was removed before
        return content, "nothing is left to edit"
    path, home = rng.choice(paths), content
    for key in path[:-1]:
        home = home[key]
    key, name, how = path[-1], ".".join(map(str, path)), rng.random()
    if extra and how < 0.25:
        field, value = rng.choice(extra)
        owners = [content, *(v for v in content.values() if isinstance(v, dict))]
        owners += [v for value in content.values() if isinstance(value, list) for v in value if isinstance(v, dict)]
        rng.choice(owners)[field] = value
        return content, f"{field} = {repr(value)[:40]}"
    if how < 0.35:
        del home[key]
        return content, f"{name} removed"
    if how < 0.45 and isinstance(home[key], (int, float)) and not isinstance(home[key], bool):
        home[key] *= rng.choice([2, 0.5, -1, 10, 1000, 10**6])
        return content, f"{name} scaled"
    if how < 0.5 and isinstance(home[key], list):
        home[key] = home[key] * rng.choice([2, 100])
        return content, f"{name} repeated"
    home[key] = rng.choice(VALUES)
    return content, f"{name} = {repr(home[key])[:40]}"


def edit_json(path, rng, extra=()):
    """Edits a JSON file in place; says how."""
    content, how = edited(json.loads(path.read_text(encoding="utf-8")), rng, extra)
    text = json.dumps(content)
    if rng.random() < 0.03:
        text, how = text.replace("[", DEEP[: rng.choice([0, 100_000])] + "[", 1), "nested deeply"
    path.write_text(text, encoding="utf-8")
    return how


def edit_bytes(path, rng):
    """Flips, cuts, appends, clears or moves bytes of a file in place; says how."""
    raw = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "flip", "cut", "append", "zeros", "garbage", "empty", "removed"])
    at = rng.randrange(max(1, len(raw)))
    if how == "flip" and raw:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del raw[at:]
    elif how == "append":
        raw += rng.randbytes(rng.choice([1, 8, 4096]))
    elif how == "zeros":
        raw[at : at + 64] = bytes(len(raw[at : at + 64]))
    elif how == "garbage":
        raw[at : at + 64] = rng.randbytes(len(raw[at : at + 64]))
    elif how == "empty":
        raw = bytearray()
    elif how == "removed":
        path.unlink()
        return "removed"
    path.write_bytes(raw)
    return f"{how} at {at}"
