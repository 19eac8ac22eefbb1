"""Runs on the same test images: is the difference more than the images drawn?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpt.data.boxes import BoxedImages
from vpt.dense.detection import DETECTIONS, TEST
from vpt.dense.detector import Objects
from vpt.dense.metrics import Matches, average_precisions, match
from vpt.errors import InputError
from vpt.evaluation.bootstrap import intervals


def paired_difference(ones: Sequence[Path], others: Sequence[Path]) -> dict[str, Any]:
    """AP and AP50 of run folders minus those of others, means over pairs, with 95 % intervals.

    `per_class` has those of AP50. The same resampled test images for all: the intervals are of the
    images drawn, not of seeds.

    Args:
        ones: run folders, such as of each seed.
        others: as many, each to be compared with the one at its place.

    Raises:
        InputError: runs with other test images.
    """
    truth = json.loads((ones[0] / TEST).read_text())
    for folder in (*ones, *others):
        if json.loads((folder / TEST).read_text()) != truth:
            raise InputError(
                f"{ones[0]} and {folder} were tested on other images: give runs on the same"
            )
    images, names = _boxed(truth), [each["name"] for each in truth["categories"]]
    pairs = [
        [_matches(folder, images, len(names)) for folder in pair]
        for pair in zip(ones, others, strict=True)
    ]

    def statistic(weights: Tensor) -> Tensor:
        weights = weights.double()
        gains = [_precisions(one, weights) - _precisions(other, weights) for one, other in pairs]
        return torch.stack(gains).mean(0)

    values = statistic(torch.ones(1, len(images)))[0].tolist()
    bounds = intervals(statistic, len(images))
    (ap, ap50, *each), (ap_interval, ap50_interval, *own) = values, bounds
    return {
        **{"ap": ap, "ap_interval": ap_interval, "ap50": ap50, "ap50_interval": ap50_interval},
        "per_class": {
            name: {"ap50": value, "ap50_interval": bound}
            for name, value, bound in zip(names, each, own, strict=True)
        },
    }


def _precisions(matches: list[Matches], weights: Tensor) -> Tensor:
    """AP, AP50, and AP50 of each class (R, 2 + C)."""
    found = torch.stack([average_precisions(each, weights) for each in matches])
    means = found.nanmean(0)
    return torch.cat([means.mean(1, keepdim=True), means[:, :1], found[:, :, 0].mT], 1)


def _boxed(truth: dict[str, Any]) -> BoxedImages:
    count = len(truth["images"])
    boxes: list[list[list[float]]] = [[] for _ in range(count)]
    labels: list[list[int]] = [[] for _ in range(count)]
    for each in truth["annotations"]:
        boxes[each["image_id"] - 1].append(_corners(each["bbox"]))
        labels[each["image_id"] - 1].append(each["category_id"] - 1)
    names = [image["file_name"] for image in truth["images"]]
    sizes = [(image["width"], image["height"]) for image in truth["images"]]
    rows = [np.array(each, np.float32).reshape(-1, 4) for each in boxes]
    kinds = [np.array(each, np.int64) for each in labels]
    return BoxedImages([Path(name) for name in names], names, rows, kinds, sizes)


def _matches(folder: Path, images: BoxedImages, num_classes: int) -> list[Matches]:
    rows: list[list[dict[str, Any]]] = [[] for _ in range(len(images))]
    for each in json.loads((folder / DETECTIONS).read_text()):
        rows[each["image_id"] - 1].append(each)
    found = [
        Objects(
            torch.tensor([_corners(row["bbox"]) for row in own]).reshape(-1, 4),
            torch.tensor([row["category_id"] - 1 for row in own], dtype=torch.int64),
            torch.tensor([row["score"] for row in own]),
        )
        for own in rows
    ]
    return match(found, images, num_classes)


def _corners(sides: list[float]) -> list[float]:
    left, top, width, height = sides
    return [left, top, left + width, top + height]
