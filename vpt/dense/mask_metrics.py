"""Metrics of masks: Dice and IoU over all pixels, average precision of objects, intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.data.masks import IGNORED, Masks
from vpt.dense.canvas import Canvas
from vpt.dense.metrics import Matches, average_precisions, pair
from vpt.evaluation.bootstrap import intervals


class Masked(NamedTuple):
    """Prediction on an image.

    Attributes:
        classes: (h, w), 0 for background; of instances 1 for the foreground.
        numbers: (h, w), of instances the number of the object.
        scores: of objects 1, 2, …
    """

    classes: np.ndarray
    numbers: np.ndarray | None
    scores: np.ndarray


def mask_metrics(
    found: Sequence[Masked],
    truth: Sequence[np.ndarray],
    class_names: Sequence[str],
    kind: Masks,
    patients: Sequence[str] | None,
) -> dict[str, Any]:
    """Metrics of masks (h, w) of each image, at its own size; None where undefined.

    `dice` and `iou` are of all pixels of all images, the mean over classes but background. Of
    instances also `ap` (IoU .5 to .95) and `ap50` of objects, and the mean absolute difference of
    an image's counts. 95 % intervals resample patients, else images.
    """
    classes = [as_classes(mask, kind) for mask in truth]
    pairs = zip(found, classes, strict=True)
    counts = torch.stack([_counts(one.classes, other, len(class_names)) for one, other in pairs])
    matches = _match(found, truth) if kind == "instance" else None

    def statistic(weights: Tensor) -> Tensor:
        weights = weights.double()
        dice, iou = _overlaps(torch.einsum("rn,nkc->rkc", weights, counts))
        columns = [dice.nanmean(1), iou.nanmean(1)]
        if matches is not None:
            precisions = average_precisions(matches, weights)
            columns += [precisions.mean(1), precisions[:, 0]]
        return torch.stack(columns, 1)

    names = ["dice", "iou", *(["ap", "ap50"] if matches else [])]
    values = statistic(torch.ones(1, len(found)))[0].tolist()
    bounds = intervals(statistic, len(found), patients)
    metrics: dict[str, Any] = {}
    for name, value, bound in zip(names, values, bounds, strict=True):
        metrics |= {name: _known(value), f"{name}_interval": bound}
    dice, iou = _overlaps(counts.sum(0)[None])
    metrics["per_class"] = {
        name: {"dice": _known(d), "iou": _known(i), "pixels": int(n)}
        for name, d, i, n in zip(
            class_names, dice[0].tolist(), iou[0].tolist(), counts[:, 2].sum(0), strict=True
        )
    }
    if matches is not None:
        predicted = torch.tensor([len(each.scores) for each in found])
        metrics["counting_error"] = (predicted - matches.positives).abs().double().mean().item()
        metrics["objects"] = int(matches.positives.sum())
    return {**metrics, "num_test": len(found)}


def upper_bound(
    truth: Sequence[np.ndarray],
    canvas: Canvas,
    stride: int,
    class_names: Sequence[str],
    kind: Masks,
) -> float | None:
    """Dice of the truth itself, once it is averaged over cells of `stride` pixels of the canvas.

    What a decoder with such cells reaches at most, or little more.
    """
    counts = []
    for mask in truth:
        classes = as_classes(mask, kind)
        size = classes.shape[::-1]
        width, height = canvas.fitted(size)
        placed = torch.from_numpy(canvas.place_mask(np.where(classes == IGNORED, 0, classes), 0))
        layers = F.one_hot(placed.long(), len(class_names) + 1).permute(2, 0, 1)[None].double()
        cells = F.interpolate(F.avg_pool2d(layers, stride), layers.shape[-2:], mode="bilinear")
        back = F.interpolate(cells[:, :, :height, :width], size[::-1], mode="bilinear")
        counts.append(_counts(back[0].argmax(0).numpy(), classes, len(class_names)))
    return _known(_overlaps(torch.stack(counts).sum(0)[None])[0].nanmean().item())


def as_classes(mask: np.ndarray, kind: Masks) -> np.ndarray:
    """Class numbers of a mask's pixels: those of instances are all of class 1."""
    return (mask > 0).astype(np.int64) if kind == "instance" else mask.astype(np.int64)


def _counts(found: np.ndarray, truth: np.ndarray, num_classes: int) -> Tensor:
    """Pixels (3, C) that are of a class in both, as found, in truth; without ignored ones."""
    counted = truth != IGNORED
    found, truth = found[counted], truth[counted]
    both = np.bincount(truth[found == truth], minlength=num_classes + 1)
    rows = [both, *(np.bincount(x, minlength=num_classes + 1) for x in (found, truth))]
    return torch.from_numpy(np.stack(rows)[:, 1:].astype(np.float64))


def _overlaps(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU (R, C) of counts (R, 3, C); NaN for a class that is nowhere."""
    both, found, truth = counts.unbind(1)
    return 2 * both / (found + truth), both / (found + truth - both)


def _match(found: Sequence[Masked], truth: Sequence[np.ndarray]) -> Matches:
    """Predicted objects paired with those of the truth, by the IoU of their pixels."""
    scores, images, hits, positives = [], [], [], []
    for number, (each, mask) in enumerate(zip(found, truth, strict=True)):
        _, dense = np.unique(mask, return_inverse=True)
        dense = dense.reshape(mask.shape) + (mask.min() > 0)
        objects, count = len(each.scores), int(dense.max())
        table = np.zeros((objects + 1, count + 1))
        np.add.at(table, (each.numbers, dense), 1)
        union = table.sum(1, keepdims=True) + table.sum(0) - table
        overlaps = (table / np.maximum(union, 1))[1:, 1:]
        order = np.argsort(-each.scores, kind="stable")
        hits.append(pair(overlaps[order]))
        scores.append(each.scores[order])
        images.append(np.full(objects, number))
        positives.append(count)
    every = torch.from_numpy(np.concatenate(scores)).double()
    order = every.sort(descending=True, stable=True).indices
    hit = torch.from_numpy(np.concatenate(hits, 1))[:, order]
    image = torch.from_numpy(np.concatenate(images))[order]
    return Matches(every[order], image, hit, torch.tensor(positives))


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
