"""How good a classifier is: torchmetrics over one pass of a loader."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from vpt.engine.accelerator import Precision, make_accelerator
from vpt.errors import InputError

ECE_BINS = 15
EVAL_BATCH = 120  # split evenly over 1 to 6, or 8, processes


def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision = "auto"
) -> dict[str, float | int | None]:
    """Figures of `model` on all batches (images, labels) of `loader`; see `metrics`."""
    return metrics(*predict(model, loader, precision))


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision = "auto"
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) as float32 and labels (N,) on the CPU, in the loader's order."""
    accelerator = make_accelerator(precision)
    model.to(accelerator.device).eval()
    batches = []
    for images, labels in accelerator.prepare(loader):
        with accelerator.autocast():
            logits = model(images.to(accelerator.device))
        batches.append(accelerator.gather_for_metrics((logits.float(), labels)))
    if not batches:
        raise InputError("no images to test on: the loader gives no batches")
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    return logits, labels


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float | int | None]:
    """Figures of logits (N, C) against labels (N,), each between 0 and 1.

    Balanced accuracy is the mean recall, macro-F1 and AUROC (one against the rest) the means over
    the classes that occur in `labels`; AUROC is None where only one occurs. ECE has 15 bins.
    """
    probabilities = logits.softmax(-1)
    count = logits.shape[-1]
    present = torch.bincount(labels, minlength=count) > 0
    recall = multiclass_accuracy(probabilities, labels, count, average="none")[present]
    f1 = multiclass_f1_score(probabilities, labels, count, average="none")[present]
    auroc = None
    if present.sum() > 1:
        with warnings.catch_warnings(action="ignore"):  # of classes that do not occur
            areas = multiclass_auroc(probabilities, labels, count, average="none")
        auroc = areas[present].mean().item()
    figures = {
        "accuracy": multiclass_accuracy(probabilities, labels, count, average="micro").item(),
        "balanced_accuracy": recall.mean().item(),
        "macro_f1": f1.mean().item(),
        "auroc": auroc,
        "ece": multiclass_calibration_error(probabilities, labels, count, n_bins=ECE_BINS).item(),
    }
    finite = {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}
    return {**finite, "num_test": len(labels)}


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix (C, C) of counts: rows are true classes, columns predictions."""
    return multiclass_confusion_matrix(logits, labels, logits.shape[-1])
