"""Plot and table of a run: quality against parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stitched_llama.bundles import write_atomically
from stitched_llama.space import StitchSpace, StitchTable, format_count, higher_is_better, read_object

_LABELS = {
    "loss": "held-out loss (nats)",
    "exact_match": "exact match on held-out rows (%)",
    "accuracy": "accuracy (%)",
}


def read_baselines(path: str | Path | None, space: StitchSpace) -> dict[str, dict[str, float]]:
    """The result of a baseline recipe: anchor key -> metric -> value; empty for None.

    Raises:
        ValueError: there is no such file, it is not JSON of numbers, or it names a stitch that is not an anchor of the space.
    """
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(
            f"there is no file {path} of baselines: run the baseline recipe with --rows {path}, or leave it out"
        )
    found = read_object(Path(path))
    known = [stitch.key for stitch in space if stitch.is_anchor]
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(
            f"{path} has a row of {unknown[0]}, the anchors here are {', '.join(known)}: it is of other anchors"
        )
    for key, values in found.items():
        if not isinstance(values, dict) or any(type(value) not in (int, float) for value in values.values()):
            raise ValueError(f"{path}: the row of {key} is {repr(values)[:200]}, an object of numbers is needed")
    return found


def plot_stitches(
    space: StitchSpace,
    table: StitchTable,
    path: str | Path,
    metrics: Sequence[str] = ("loss", "exact_match", "accuracy"),
    alone: Mapping[str, Mapping[str, float]] | None = None,
    title: str = "",
) -> None:
    """Plots each metric against parameters: every stitch, anchors as stars, the published front as a line.

    The range of a `{metric}_before` in the table is written into the legend. A metric with one value for all stitches is not
    plotted.

    Args:
        alone: anchor key -> metric -> value of that anchor fine-tuned alone, drawn as diamonds; by default from the table.
        title: of the whole figure.

    Raises:
        ImportError: matplotlib is missing (install the `train` extra).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    measured = [name for name in metrics if name in table.metrics]
    metrics = [name for name in measured if len(set(table.metrics[name].values())) > 1] or measured[:1]
    figure, axes = plt.subplots(1, len(metrics), figsize=(6.5 * len(metrics), 5), squeeze=False, layout="constrained")
    published = set(table.published(space))
    for axis, name in zip(axes[0], metrics):
        scale = 100 if name != "loss" else 1
        values = {key: value * scale for key, value in table.metrics[name].items()}
        inner = [s for s in space if s.key in values and not s.is_anchor]
        axis.plot([s.params for s in inner], [values[s.key] for s in inner], "o", color="tab:blue", label="stitch")
        front = [s for s in space if s.key in values and s.key in published]
        if front:
            label = "published front" + ("" if name == table.metric else f" (chosen by {table.metric})")
            axis.plot(
                [s.params for s in front], [values[s.key] for s in front], "-", color="tab:blue", alpha=0.6, label=label
            )
        anchors = [s for s in space if s.key in values and s.is_anchor]
        axis.plot(
            [s.params for s in anchors],
            [values[s.key] for s in anchors],
            "*",
            ms=17,
            color="gold",
            mec="black",
            label="anchor",
        )
        baselines = [
            (space[key], found[name] * scale)
            for key, found in (table.alone if alone is None else alone).items()
            if name in found
        ]
        if baselines:
            axis.plot(
                [s.params for s, _ in baselines],
                [v for _, v in baselines],
                "D",
                color="tab:red",
                label="anchor tuned alone",
            )
        axis.set_xlabel("parameters of the stitch")
        axis.set_ylabel(
            _LABELS.get(name, name) + (" (higher is better)" if higher_is_better(name) else " (lower is better)")
        )
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axis.grid(alpha=0.3)
        before = [value * scale for value in table.metrics.get(f"{name}_before", {}).values()]
        if before:  # as text: points at that scale would flatten the plot
            axis.plot([], [], " ", label=f"before training: {min(before):.3g} to {max(before):.3g}")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.suptitle(title)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format=Path(path).suffix[1:] or "png"))
    plt.close(figure)


def format_table(space: StitchSpace, table: StitchTable) -> str:
    """The table of a run as text: one line a stitch, with marks for anchors and published stitches; without `*_test_before`."""
    names = [name for name in table.metrics if not name.endswith("_test_before")]
    published = set(table.published(space))
    lines = [f"{'id':>3} {'key':<24} {'params':>8} " + " ".join(f"{name:>18}" for name in names) + "  importance"]
    for stitch in space:
        values = " ".join(f"{table.metrics[name].get(stitch.key, float('nan')):18.4f}" for name in names)
        score = table.importance.get(stitch.key)
        marks = ("*" if stitch.is_anchor else " ") + ("+" if stitch.key in published else " ")
        lines.append(
            f"{stitch.stitch_id:>3} {stitch.key:<24} {format_count(stitch.params):>8} {values} "
            + (f"{score:11.4g}" if score is not None else " " * 11) + f" {marks}"
        )  # fmt: skip
    return "\n".join([*lines, "* anchor, + published"])


def format_gains(gains: Mapping[str, Mapping[str, float]]) -> str:
    """Palette gains (from `space.palette_gains`) as text, one line a metric."""
    return "\n".join(
        f"palette gain by {name}: {gain['params']:.2f} over parameters, {gain['macs']:.2f} over MACs"
        for name, gain in gains.items()
    )
