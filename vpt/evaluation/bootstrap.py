"""95 % intervals by the percentile bootstrap, resampling patients; exact for rates of 0 and 1."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpt.targets import Target

RESAMPLES = 1000
FEW_CLASSES = 20  # with more, classes have no metrics, and areas no intervals, of their own
_CHUNK = 100  # resamples at a time, for memory


def intervals(
    statistic: Callable[[Tensor], Tensor], count: int, patients: Sequence[str] | None = None
) -> list[list[float] | None]:
    """The 2.5 and 97.5 percentiles of K metrics over RESAMPLES resamples, always the same ones.

    Patients are drawn with replacement, each with all of its images; without patients, images.

    Args:
        statistic: weights (R, count), how often each image is drawn → metrics (R, K). Where one
            is NaN, the resample does not count for it; where all are, its interval is None.
        count: how many images.
        patients: one an image.
    """
    values = torch.cat([statistic(weights) for weights in _draw(count, patients)]).double()
    with warnings.catch_warnings(action="ignore"):  # of metrics that are NaN throughout
        bounds = np.nanpercentile(values.numpy(), (2.5, 97.5), axis=0).T
    return [pair.tolist() if np.isfinite(pair).all() else None for pair in bounds]


def metric_intervals(
    target: Target,
    logits: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    patients: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Intervals of the metrics of `target`, as `NAME_interval`.

    Up to FEW_CLASSES also those of the areas, and `per_class` the rates of each class against the
    rest (see `class_rates`).

    Args:
        target: the kind of `labels`.
        logits: (N, C).
        labels: N of them.
        class_names: in label order.
        patients: one an image.
    """
    few, truth = len(class_names) <= FEW_CLASSES, target.truth(labels, len(class_names))
    predicted, scores = target.predicted(logits), target.scores(logits)

    def statistic(weights: Tensor) -> Tensor:
        accuracy, recall, f1 = target.averages(*_counts(truth, predicted, weights))
        metrics = [accuracy, recall.nanmean(1), f1.nanmean(1)]
        if few:
            pairs = [_areas(s, t, weights) for s, t in zip(scores.T, truth.T, strict=True)]
            metrics += [torch.stack(area, 1).nanmean(1) for area in zip(*pairs, strict=True)]
        return torch.stack(metrics, 1)

    names = ["accuracy", "balanced_accuracy", "macro_f1", *(["auroc", "auprc"] if few else [])]
    pairs = intervals(statistic, len(labels), patients)
    found: dict[str, Any] = {f"{n}_interval": pair for n, pair in zip(names, pairs, strict=True)}
    everything = torch.ones(len(labels), dtype=torch.bool)
    accuracy = statistic(everything[None].double())[0, 0].item()
    found["accuracy_interval"] = proportion_interval(accuracy, pairs[0], everything, patients)
    if few:
        rates = class_rates(truth, predicted, patients)
        found["per_class"] = dict(zip(class_names, rates, strict=True))
    return found


def class_rates(
    truth: Tensor, predicted: Tensor, patients: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Sensitivity and specificity with their intervals, a dict a column of bool (N, C)."""
    columns = truth.shape[1]

    def statistic(weights: Tensor) -> Tensor:
        hit, claimed, positive, total = _counts(truth, predicted, weights)
        return torch.cat([hit / positive, 1 - (claimed - hit) / (total - positive)], 1)

    found = intervals(statistic, len(truth), patients)
    once = torch.ones(1, len(truth), dtype=torch.float64)
    rates = [None if math.isnan(rate) else rate for rate in statistic(once)[0].tolist()]
    images = torch.cat([truth, ~truth], 1).T  # those that a rate is a proportion of
    found = [proportion_interval(*of, patients) for of in zip(rates, found, images, strict=True)]
    return [
        {
            "sensitivity": rates[i],
            "sensitivity_interval": found[i],
            "specificity": rates[columns + i],
            "specificity_interval": found[columns + i],
        }
        for i in range(columns)
    ]


def proportion_interval(
    proportion: float | None,
    resampled: list[float] | None,
    images: Tensor,
    patients: Sequence[str] | None,
) -> list[float] | None:
    """Interval of a proportion of `images`, bool (N,): `resampled`, except at 0 and 1.

    These are the same in every resample, which is no certainty: they have the exact interval of
    Clopper & Pearson (1934), each patient (image, where none are known) being one trial.
    """
    if proportion not in (0, 1):
        return resampled
    names = np.arange(len(images)) if patients is None else np.array(patients)
    edge = 0.025 ** (1 / len(np.unique(names[images.numpy()])))
    return [edge, 1.0] if proportion else [0.0, 1 - edge]


def _draw(count: int, patients: Sequence[str] | None) -> Iterator[Tensor]:
    names = np.arange(count) if patients is None else np.array(patients)
    _, patient = np.unique(names, return_inverse=True)
    number = int(patient.max()) + 1
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, RESAMPLES, _CHUNK):
        drawn = torch.randint(number, (_CHUNK, number), generator=generator)
        times = torch.zeros(_CHUNK, number).scatter_add_(1, drawn, torch.ones(drawn.shape))
        yield times[:, patient]


def _counts(
    truth: Tensor, predicted: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted numbers (R, C) of true positives, of positive calls, of positives; (R, 1) of all."""
    found = (weights @ which.to(weights) for which in (truth & predicted, predicted, truth))
    return *found, weights.sum(1, keepdim=True)


def _areas(scores: Tensor, truth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC and average precision (R,) of scores (N,); NaN without positives or negatives.

    Equal scores are one threshold, as in scikit-learn.
    """
    values, threshold = scores.unique(return_inverse=True)
    zeros = weights.new_zeros(len(weights), len(values))
    positive = zeros.index_add(1, threshold, weights * truth)
    negative = zeros.index_add(1, threshold, weights * ~truth)
    positives, negatives = positive.sum(1), negative.sum(1)
    below = negative.cumsum(1) - negative / 2  # a tie counts half
    auroc = (positive * below).sum(1) / (positives * negatives)
    hit, false = (x.flip(1).cumsum(1).flip(1) for x in (positive, negative))  # at this or above
    precision = torch.nan_to_num(hit / (hit + false))
    auprc = torch.where(negatives > 0, (precision * positive).sum(1) / positives, torch.nan)
    return auroc, auprc
