"""Segments of an uploaded image, as Hugging Face's image segmentation answers them."""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel

from vpt.dense.canvas import Canvas
from vpt.dense.mask_metrics import Masked
from vpt.dense.segmentation import to_image
from vpt.dense.segmenter import Segmenter

MOST = 2**26  # numbers in the logits of an image


class Segment(BaseModel):
    """The pixels of an object, or of a class, which has no score."""

    label: str
    score: float | None
    mask: str  # a PNG of the image's size in base64, white on black


def most_pixels(segmenter: Segmenter) -> int:
    """Pixels of an image that there is memory for."""
    return MOST // segmenter.num_outputs


@torch.no_grad()
def masks_of(
    segmenter: Segmenter, pixels: np.ndarray, canvas: Canvas, size: tuple[int, int]
) -> Masked:
    """Masks of an image of `size`, from its pixels on the canvas."""
    backbone = segmenter.maps.method.backbone
    images = backbone.preprocess.normalize(torch.from_numpy(pixels)[None]).to(backbone.device)
    return to_image(segmenter, segmenter(images)[0], canvas, size)


def segments(segmenter: Segmenter, masked: Masked, threshold: float | None) -> list[dict[str, Any]]:
    """Each as `Segment`: objects of at least that score, best first, or classes that are there."""
    names = segmenter.class_names
    if masked.numbers is None:
        there = np.unique(masked.classes[masked.classes > 0]).tolist()
        return [_segment(names[number - 1], None, masked.classes == number) for number in there]
    return [
        _segment(names[0], float(masked.scores[index]), masked.numbers == index + 1)
        for index in np.argsort(-masked.scores, kind="stable")
        if masked.scores[index] >= (threshold or 0)
    ]


def _segment(label: str, score: float | None, mask: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return {"label": label, "score": score, "mask": base64.b64encode(buffer.getvalue()).decode()}
