"""What each budget gives: the staircase of several methods over one pair of anchors, and their palette gains.

    python benchmarks/staircase.py ours=runs/a/result.json ESTA=runs/b/result.json --untrained rivals.json --out staircase.png

Each NAME=FILE is a `result.json` of `stitched-llama finetune`; `--untrained` is what `benchmarks/untrained.py` wrote. All methods may fall
back on the anchors as the first run tuned them, alone or inside, whichever is better. Half of the held-out rows choose, the other
half is shown. Prints a table and, last, one JSON line.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from stitched_llama.space import format_count, staircase_gain

_COSTS = {"params": "params", "macs": "macs_per_token"}
Point = tuple[float, float, float]  # cost, loss on the rows that choose, loss on the rows that are shown


def read_run(path: Path, by: str) -> tuple[list[Point], dict[str, list[Point]]]:
    """Points of the stitches between of a run, and of its anchors (alone and inside) by key."""
    row = json.loads(path.read_text(encoding="utf-8"))
    between, anchors = [], {}
    for stitch in row["table"]["stitches"]:
        values = stitch["metrics"]
        cost = stitch[_COSTS[by]]
        found = [(cost, values["loss"], values["loss_test"])]
        if ">" in stitch["key"]:
            between += found
        else:
            alone = row["baselines"].get(stitch["key"])
            anchors[stitch["key"]] = found + ([(cost, alone["loss"], alone["loss_test"])] if alone else [])
    return between, anchors


def best(points: list[Point]) -> Point:
    """The point of least loss on the rows that choose."""
    return min(points, key=lambda point: point[1])


def gain(small: Point, between: list[Point], large: Point) -> float:
    """`palette_gain` of these points."""
    inner = sorted(point for point in between if small[0] < point[0] < large[0])
    return staircase_gain([(cost, -choose, -judge) for cost, choose, judge in (small, *inner, large)])


def stairs(small: Point, between: list[Point], large: Point) -> tuple[list[float], list[float]]:
    """Costs and shown losses of what each budget gives."""
    chosen, costs, losses = small, [], []
    for point in (small, *sorted(p for p in between if small[0] < p[0] < large[0]), large):
        chosen = best([chosen, point])
        costs.append(point[0])
        losses.append(chosen[2])
    return costs, losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the staircase of several methods.")
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=FILE", help="results of finetune; the first one's anchors count for all"
    )
    parser.add_argument("--untrained", type=Path, help="what benchmarks/untrained.py wrote")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    runs = dict(run.split("=", 1) for run in options.runs)
    gains: dict[str, dict[str, float]] = {}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for by in ("params", "macs"):
        _, anchors = read_run(Path(next(iter(runs.values()))), by)
        small, *_, large = sorted((best(points) for points in anchors.values()), key=lambda point: point[0])
        methods = {name: read_run(Path(path), by)[0] for name, path in runs.items()}
        if options.untrained:
            found: dict[str, list[dict[str, Any]]] = json.loads(options.untrained.read_text())["methods"]
            methods |= {name: [(p[by], p["loss"], p["loss_test"]) for p in points] for name, points in found.items()}
        for name, between in methods.items():
            gains.setdefault(name, {})[by] = round(gain(small, between, large), 3)
            if by == "params":
                curves[name] = stairs(small, between, large)
    draw(curves, (small, large), options.title, options.out)
    print(f"{'method':<26} {'gain by parameters':>20} {'gain by MACs':>14}   loss that budgets give, small to large")
    for name, values in gains.items():
        told = " ".join(f"{loss:.3f}" for loss in curves[name][1])
        print(f"{name:<26} {values['params']:20.3f} {values['macs']:14.3f}   {told}")
    print(json.dumps({"palette_gain": gains, "runs": runs}))


def draw(curves: dict[str, tuple[list[float], list[float]]], ends: tuple[Point, Point], title: str, out: Path) -> None:
    """The picture: one staircase a method, the line between the anchors dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axis = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for number, (name, (costs, losses)) in enumerate(curves.items()):
        axis.step(costs, losses, where="post", label=name, lw=2.5 if number == 0 else 1.3, zorder=9 - number)
    (left, right) = ends
    axis.plot([left[0], right[0]], [left[2], right[2]], "--", color="grey", lw=1, label="straight line")
    axis.plot(
        [left[0], right[0]],
        [left[2], right[2]],
        "*",
        ms=17,
        color="gold",
        mec="black",
        label="anchors, fine-tuned",
        zorder=10,
    )
    axis.set_xlabel("budget (parameters)")
    axis.set_ylabel("held-out loss of what the budget gives (nats; lower is better)")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    axis.set_title(title)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
