"""Objects in an uploaded image, as Hugging Face's object detection answers them."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from vpt.dense.canvas import Canvas, fill_colour
from vpt.dense.detection import to_image
from vpt.dense.detector import Detector
from vpt.dense.model import Dense
from vpt.serve.uploads import Refused, open_upload


class Box(BaseModel):
    """Whole pixels of the image, from its left top."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class Found(BaseModel):
    """An object."""

    score: float
    label: str
    box: Box


def place(
    model: Dense, data: bytes, most: float = math.inf
) -> tuple[np.ndarray, Canvas, tuple[int, int]]:
    """An image file on the model's canvas, uint8 (height, width, 3); its own size.

    Raises:
        Refused: as `open_upload`; more than `most` pixels.
    """
    height, width = model.maps.size
    canvas, fill = Canvas(width, height), fill_colour(model.maps.method.backbone)

    def placed(image: Image.Image) -> tuple[np.ndarray, Canvas, tuple[int, int]]:
        if image.width * image.height > most:
            raise ValueError(f"{image.width} × {image.height} pixels; {most:,} have masks at most")
        return canvas.place(image, fill), canvas, image.size

    return open_upload(data, model.metadata, placed)


@torch.no_grad()
def boxes_of(
    detector: Detector,
    pixels: np.ndarray,
    canvas: Canvas,
    size: tuple[int, int],
    threshold: float | None,
) -> list[dict[str, Any]]:
    """Objects of at least that score (None: the artefact's), each as `Found`, best first."""
    backbone = detector.maps.method.backbone
    images = backbone.preprocess.normalize(torch.from_numpy(pixels)[None]).to(backbone.device)
    objects = to_image(detector(images)[0], canvas, size)
    least = detector.threshold if threshold is None else threshold
    return [
        {
            "score": score,
            "label": detector.class_names[label],
            "box": dict(zip(Box.model_fields, (round(value) for value in box), strict=True)),
        }
        for box, label, score in zip(*(part.tolist() for part in objects), strict=True)
        if score >= least
    ]


def threshold_of(parameters: dict[str, Any]) -> float | None:
    """Hugging Face's parameter of that name.

    Raises:
        Refused: it is no number from 0 to 1.
    """
    threshold = parameters.get("threshold")
    if threshold is None:
        return None
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise Refused(400, "threshold: give a number from 0 to 1")
    if not 0 <= threshold <= 1:
        raise Refused(400, "threshold: give a number from 0 to 1")
    return float(threshold)
