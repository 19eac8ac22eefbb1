"""The plot of a stream: accuracy on each task after each stage, and the mean of those so far."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vpt.evaluation.lettering import letter
from vpt.stream.metrics import Rows, summary

NUMBERED = 12  # more tasks than this are drawn without numbers


def draw_stream(title: str, rows: dict[str, Rows], tasks: list[str], note: str = "") -> bytes:
    """PNG of one or more accuracy matrices by name: the first as a map, the means of all as lines.

    Args:
        title: above.
        rows: name → accuracies after each stage on each task so far.
        tasks: their names.
        note: below.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_map(left, next(iter(rows.values())), tasks)
    for name, matrix in rows.items():
        means = [100 * np.mean(row[: number + 1]) for number, row in enumerate(matrix)]
        found = summary(matrix)
        label = f"{name}: final {found['final_accuracy']:.1%}, forgetting {found['forgetting']:.1%}"
        right.plot(range(1, len(means) + 1), means, marker="o", label=label)
    right.set(xlabel="tasks learned", ylabel="mean accuracy on them, %")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="best", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.supxlabel(note, fontsize="medium")
    buffer = io.BytesIO()
    letter(figure).savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _draw_map(axes: Axes, rows: Rows, tasks: list[str]) -> None:
    count = len(rows)
    matrix = np.full((count, count), np.nan)
    for number, row in enumerate(rows):
        matrix[number, : number + 1] = [100 * value for value in row[: number + 1]]
    picture = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=100)
    axes.figure.colorbar(picture, ax=axes, label="accuracy, %", shrink=0.8)
    ticks = range(count)
    axes.set_xticks(ticks, tasks, rotation="vertical" if count > 3 else "horizontal")
    axes.set_yticks(ticks, [f"after {number + 1}" for number in ticks])
    if count <= NUMBERED:
        for (down, along), value in np.ndenumerate(matrix):
            if along <= down:
                colour = "black" if value > 60 else "white"
                axes.text(along, down, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set_xlabel("tested on")
