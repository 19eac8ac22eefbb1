"""Two runs on the same test images: is the difference more than the images drawn?"""

import json
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


def paired_difference(one: Path, other: Path) -> dict[str, Any]:
    """AP and AP50 of the run folder `one` minus those of `other`, with 95 % intervals.

    The same resampled test images for both.

    Raises:
        InputError: runs with other test images.
    """
    truth = json.loads((one / TEST).read_text())
    if truth != json.loads((other / TEST).read_text()):
        raise InputError(
            f"{one} and {other} were tested on other images: give two runs on the same"
        )
    images = _boxed(truth)
    both = [_matches(folder, images, len(truth["categories"])) for folder in (one, other)]

    def statistic(weights: Tensor) -> Tensor:
        first, second = (_mean_precisions(matches, weights.double()) for matches in both)
        return first - second

    (ap, ap50) = statistic(torch.ones(1, len(images)))[0].tolist()
    bounds = intervals(statistic, len(images))
    return {"ap": ap, "ap_interval": bounds[0], "ap50": ap50, "ap50_interval": bounds[1]}


def _mean_precisions(matches: list[Matches], weights: Tensor) -> Tensor:
    """AP and AP50 (R, 2)."""
    found = torch.stack([average_precisions(each, weights) for each in matches]).nanmean(0)
    return torch.stack([found.mean(1), found[:, 0]], 1)


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
