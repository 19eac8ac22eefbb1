"""Metrics of a classifier, from one pass of a loader."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vpt import targets
from vpt.accelerator import Precision, make_accelerator
from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.errors import InputError
from vpt.methods import Method
from vpt.methods.base import Batch

EVAL_BATCH = 120  # split evenly over 1 to 6, or 8, processes


def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision = "auto"
) -> dict[str, float | int | None]:
    """Metrics of `model` on all batches (images, labels) of `loader`; see `Target.metrics`.

    The target is the model's, or for a model that is not of this package the one that labels fit.
    """
    logits, labels = predict(model, loader, precision)
    target = getattr(model, "target", None) or targets.of(labels)
    return target.metrics(logits, labels)


@torch.no_grad()
def predict(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], precision: Precision = "auto"
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) as float32 and labels (N,) or (N, C) on the CPU, in the loader's order."""
    accelerator = make_accelerator(precision)
    model.to(accelerator.device).eval()
    batches = []
    conform = getattr(model, "conform", None)  # a model that is not of this package has none
    for number, batch in enumerate(accelerator.prepare(loader)):
        batch = Batch.read(batch, number, conform)
        with accelerator.autocast():
            logits = model(batch.inputs.to(accelerator.device))
        batches.append(accelerator.gather_for_metrics((logits.float(), batch.labels)))
    if not batches:
        raise InputError("no images to test on: the loader gives no batches")
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    return logits, labels


def test_loader(model: Method, samples: Samples, workers: int = 0) -> DataLoader:
    """Batches of `samples` for `model`, in their order and without augmentation."""
    return make_loader(samples, model.backbone.preprocess, EVAL_BATCH, workers=workers)


def outputs(
    model: Method, samples: Samples, precision: Precision = "auto", workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels of `samples`."""
    return predict(model, test_loader(model, samples, workers), precision)


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Confusion matrix (C, C) of counts: rows are true classes, columns predictions."""
    return multiclass_confusion_matrix(logits, labels, logits.shape[-1])
