"""Plots of results, drawn by matplotlib without a screen."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay
from torch import Tensor

from vpt.evaluation.lettering import labels as shown
from vpt.evaluation.lettering import legend, letter
from vpt.files import write_atomically
from vpt.targets import Target

LABELLED = 25  # more classes than this are drawn without names and counts


def draw_confusion(matrix: Tensor, class_names: Sequence[str], path: Path, note: str = "") -> None:
    """Confusion matrix (C, C) of counts as a PNG, with `note` below; see `save` for the names."""
    few = len(class_names) <= LABELLED
    side = max(4.5, 0.5 * len(class_names)) if few else 8
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    names = _plain(class_names)
    display = ConfusionMatrixDisplay(matrix.numpy(), display_labels=names if few else None)
    display.plot(ax=axes, cmap="Blues", include_values=few, xticks_rotation="vertical")
    if not few:
        axes.set(xticks=[], yticks=[])
    axes.set(
        xlabel="predicted", ylabel="true", title=f"{int(matrix.trace())} of {int(matrix.sum())}"
    )
    figure.supxlabel(note, fontsize="medium")
    save(figure, path, class_names if few else ())


def draw_reliability(
    target: Target, probabilities: Mapping[str, Tensor], labels: Tensor, bins: int = 10
) -> Figure:
    """Frequency over confidence, a line for each of `probabilities`, such as before and after.

    Probabilities are (N, C); `Target.reliability` says of which predictions.
    """
    figure, axes = _square("reliability")
    names = _plain([*probabilities])
    for name, values in zip(names, probabilities.values(), strict=True):
        right, confidence = target.reliability(values, labels)
        right, confidence = right.numpy().astype(int), confidence.clamp(0, 1).numpy()
        CalibrationDisplay.from_predictions(
            right, confidence, n_bins=bins, strategy="quantile", name=name, pos_label=1, ax=axes
        )
    axes.set(xlabel="confidence", ylabel="frequency")
    return letter(figure)


def draw_roc(
    target: Target, probabilities: Tensor, labels: Tensor, class_names: Sequence[str]
) -> Figure:
    """Sensitivity over 1 - specificity of each class against the rest, with its area.

    Probabilities are (N, C). Classes without both kinds of images have no curve; see also
    `Target.curves`. Names that no font has are numbers, see `lettering.legend`.
    """
    figure, axes = _square("ROC")
    for truth, scores, name in _curves(target, probabilities, labels, class_names):
        RocCurveDisplay.from_predictions(truth, scores, name=name, ax=axes)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    return letter(figure)


def draw_precision_recall(
    target: Target, probabilities: Tensor, labels: Tensor, class_names: Sequence[str]
) -> Figure:
    """Precision over sensitivity, with the average precision; see `draw_roc`."""
    figure, axes = _square("precision and recall")
    for truth, scores, name in _curves(target, probabilities, labels, class_names):
        PrecisionRecallDisplay.from_predictions(truth, scores, name=name, ax=axes)
    axes.set(xlabel="sensitivity (recall)", ylabel="precision")
    return letter(figure)


def draw_risk_coverage(
    probabilities: Tensor, labels: Tensor, refer_below: float | None = None
) -> Figure:
    """Error rate on the most certain images over their proportion, and where `refer_below` stands.

    Probabilities are (N, C), labels (N,).
    """
    figure, axes = _square("risk and coverage")
    confidence, best = probabilities.max(-1)
    order = confidence.argsort(descending=True)
    wrong = (best != labels)[order].double()
    images = torch.arange(1, len(labels) + 1)
    axes.plot(images / len(labels), wrong.cumsum(0) / images)
    if refer_below is not None:
        coverage = (confidence >= refer_below).double().mean().item()
        axes.axvline(coverage, color="0.5", linestyle="--", label=f"{coverage:.0%} decided")
        axes.legend()
    axes.set(xlabel="coverage", ylabel="error rate", ylim=(0, None))
    return figure


def _square(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curves(
    target: Target, probabilities: Tensor, labels: Tensor, class_names: Sequence[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Truth, scores and name of each class that has a curve."""
    truth, names = target.truth(labels, len(class_names)).numpy(), _plain(class_names)
    for index in target.curves(len(class_names)):
        column = truth[:, index]
        if column.any() and not column.all():
            yield column, probabilities[:, index].numpy(), names[index]


def _plain(names: Sequence[str]) -> list[str]:
    return [name.replace("$", r"\$") for name in shown(names)]  # no mathematics in names


def save(figure: Figure, path: Path, names: Sequence[str] = ()) -> None:
    """Write a plot as PNG, atomically.

    Where it shows any of `names` as a number, for want of a font, a .txt beside it tells which.
    """
    buffer = io.BytesIO()
    letter(figure).savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
    if lines := legend(names):
        write_atomically(path.with_suffix(".txt"), "".join(f"{x}\n" for x in lines).encode())
