"""Accuracy against shots, accuracy against cost, learning curves: a small plot each."""

import base64
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from vpt.evaluation.lettering import labels, legend, letter
from vpt.report.runs import shots_text

STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "svg.hashsalt": "vpt",  # the same runs give the same file
    "text.parse_math": False,  # no mathematics in names
}
# axis of cost → its words, and the decade below which it is linear, for there may be zeros
COSTS = {"train_seconds": ("seconds to train", 0), "stored_parameters": ("stored parameters", 3)}


@dataclass(frozen=True)
class Plot:
    """A plot as a data URI, and what it shows in words."""

    uri: str
    caption: str


def draw_plots(cells: pd.DataFrame, curves: pd.DataFrame) -> dict[str, list[Plot]]:
    """Data set → its plots, those for which there is data; a method has one colour in all.

    Args:
        cells: from `vpt.report.tables.make_cells`.
        curves: from `vpt.report.runs.read_curves`.
    """
    lines = dict.fromkeys(zip(cells.backbone, cells.method, strict=True))
    several = cells.backbone.nunique() > 1
    looks = pd.DataFrame(sorted(lines), columns=["backbone", "method"])
    names = list(looks.method + (", " + looks.backbone if several else ""))
    looks["line"] = labels(names)
    palette = cycle(mpl.color_sequences["tab10" if len(lines) <= 10 else "tab20"])
    looks["colour"] = [colour for colour, _ in zip(palette, lines, strict=False)]
    cells, curves = cells.merge(looks), curves.merge(looks)
    with mpl.rc_context(STYLE):
        return {
            data: [
                replace(plot, caption=" ".join([plot.caption, *legend(names)]))
                for plot in _draw(part, curves[curves["data"] == data])
            ]
            for data, part in cells.groupby("data")
        }


def _draw(cells: pd.DataFrame, curves: pd.DataFrame) -> Iterator[Plot]:
    counted = cells[cells.shots < math.inf]
    if counted.shots.nunique() > 1:
        figure = _figure()
        _shots(figure.subplots(), counted)
        yield _finish(figure, "Test accuracy against the number of training images a class.")
    most = cells.shots.max()
    for key, (words, _) in COSTS.items():
        known = cells[(cells.shots == most) & cells[key].notna()]
        if known.empty:
            continue
        figure = _figure()
        _cost(figure.subplots(), known, key)
        yield _finish(figure, f"Test accuracy against {words} (shots: {shots_text(most)}).")
    for shots, part in curves.groupby("shots"):
        figure = _figure(height=4.4)
        _learning(*figure.subplots(2, sharex=True), part)
        yield _finish(figure, f"Learning curves (shots: {shots_text(shots)}).")


def _shots(axes: Axes, cells: pd.DataFrame) -> None:
    for line, part in cells.groupby("line"):
        _points(axes, part.shots, part, line)
    ticks = sorted(set(cells.shots))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [shots_text(tick) for tick in ticks])
    axes.set(xlabel="training images a class", ylabel="test accuracy, %")


def _cost(axes: Axes, cells: pd.DataFrame, key: str) -> None:
    for line, part in cells.groupby("line"):
        _points(axes, part[key], part, line, linestyle="none")
    words, first = COSTS[key]
    last = max(first, math.ceil(math.log10(max(1, cells[key].max()))))
    axes.set_xscale("symlog", linthresh=10**first)
    axes.set_xticks([0, *(10**decade for decade in range(first, last + 1))])
    axes.minorticks_off()
    axes.set_xlim(-(10**first) / 5, 10**last)
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if first else "{x:g}")
    axes.set(xlabel=words, ylabel="test accuracy, %")


def _points(axes: Axes, x: pd.Series, cells: pd.DataFrame, line: str, **style: str) -> None:
    bars = 100 * cells.accuracy_std
    colour = cells.colour.iloc[0]
    axes.errorbar(
        x, 100 * cells.accuracy, bars, color=colour, label=line, marker="o", capsize=3, **style
    )


def _learning(upper: Axes, lower: Axes, curves: pd.DataFrame) -> None:
    for line, part in curves.groupby("line"):
        means = part.groupby("epoch")[["accuracy", "val_accuracy", "loss"]].mean()
        colour = part.colour.iloc[0]
        upper.plot(100 * means.accuracy, color=colour, label=line)
        upper.plot(100 * means.val_accuracy, color=colour, linestyle="dashed")
        lower.plot(means.loss, color=colour)
    upper.set(ylabel="accuracy, %")
    lower.set(xlabel="epoch", ylabel="training loss")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))


def _figure(height: float = 3.2) -> Figure:
    return Figure(figsize=(4, height), layout="constrained")


def _finish(figure: Figure, caption: str) -> Plot:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.1, 0))
    buffer = io.BytesIO()
    letter(figure).savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    code = base64.b64encode(buffer.getvalue()).decode()
    return Plot(f"data:image/svg+xml;base64,{code}", caption)
