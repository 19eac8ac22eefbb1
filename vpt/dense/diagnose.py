"""Said before training: boxes that no place of the pyramid can learn at this size."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from vpt.data.boxes import BoxedImages
from vpt.dense.canvas import Canvas
from vpt.dense.config import DetectHeadConfig
from vpt.dense.detector import make_fcos, place_squares

ENOUGH = 0.99  # of the boxes of each class
_GROWTH = (1.25, 1.5, 2, 3, 4)  # sizes that are tried


class _Matched:
    """A head whose loss is what torchvision's FCOS has matched."""

    def compute_loss(
        self, targets: object, outputs: object, places: object, matched: object
    ) -> object:
        return matched


def matchable(images: BoxedImages, canvas: Canvas, patch: int, num_classes: int) -> list[float]:
    """Proportion of each class's boxes that some place learns; NaN where there are none."""
    fcos = make_fcos(SimpleNamespace(out_channels=32), _Matched(), 1, DetectHeadConfig())
    rows, columns = canvas.height // patch, canvas.width // patch
    halves = -(-rows // 2), -(-columns // 2)
    squares = place_squares([(2 * rows, 2 * columns), (rows, columns), halves], patch)
    counts = [len(level) for level in squares]
    hit: list[Tensor] = []
    for boxes, size in zip(images.boxes, images.sizes, strict=True):
        target = {"boxes": torch.from_numpy(boxes * canvas.scale(size))}
        (matched,) = fcos.compute_loss([target], {}, [torch.cat(squares)], counts)
        hit.append(torch.isin(torch.arange(len(boxes)), matched))
    found, labels = torch.cat(hit).numpy(), np.concatenate(images.labels)
    with np.errstate(invalid="ignore"):
        totals = np.bincount(labels, minlength=num_classes)
        return (np.bincount(labels, found, num_classes) / totals).tolist()


def diagnose(
    images: BoxedImages, canvas: Canvas, patch: int, class_names: Sequence[str], fixed: bool
) -> tuple[dict[str, float], list[str]]:
    """The proportion by class, and lines on classes with too few, with the size that would do.

    `fixed`: the backbone takes no other size.
    """
    found = matchable(images, canvas, patch, len(class_names))
    proportions = {name: value for name, value in zip(class_names, found, strict=True)}
    few = {name: value for name, value in proportions.items() if value < ENOUGH}
    if not few:
        return proportions, []
    said = ", ".join(f"{name} {1 - value:.1%}" for name, value in few.items())
    lines = [f"boxes that no place of the pyramid can match at {max(canvas)} px: {said}"]
    if not fixed:
        for growth in _GROWTH:
            step = 2 * patch
            larger = Canvas(*(round(side * growth / step) * step for side in canvas))
            again = matchable(images, larger, patch, len(class_names))
            if not any(value < ENOUGH for value in again):
                return proportions, [f"{lines[0]}; data.size={max(larger)} would do"]
        lines = [f"{lines[0]}; no size up to {4 * max(canvas)} does: some boxes hide others"]
    return proportions, lines
