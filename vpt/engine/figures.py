"""Figures of results, drawn by matplotlib without a screen."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from vpt.artifact import write_atomically

LABELLED = 25  # more classes than this are drawn without names and counts


def draw_confusion(matrix: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix (C, C) of counts as a PNG."""
    few = len(class_names) <= LABELLED
    side = max(4.5, 0.5 * len(class_names)) if few else 8
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    names = [name.replace("$", r"\$") for name in class_names]  # no mathematics in names
    display = ConfusionMatrixDisplay(matrix.numpy(), display_labels=names if few else None)
    display.plot(ax=axes, cmap="Blues", include_values=few, xticks_rotation="vertical")
    if not few:
        axes.set(xticks=[], yticks=[])
    axes.set(
        xlabel="predicted", ylabel="true", title=f"{int(matrix.trace())} of {int(matrix.sum())}"
    )
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
