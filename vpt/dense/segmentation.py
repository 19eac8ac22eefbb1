"""Stages of a run on masks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.data.images import upright_size
from vpt.data.masks import IGNORED, MaskData, MaskedImages, read_masks
from vpt.dense.canvas import Canvas
from vpt.dense.config import SegmentConfig, SegmentDataConfig
from vpt.dense.images import CanvasImages, Flip, MapSource
from vpt.dense.instances import border, objects_of
from vpt.dense.mask_metrics import Masked, mask_metrics, upper_bound
from vpt.dense.pyramid import Maps
from vpt.dense.segmenter import STEP, Segmenter
from vpt.dense.split import Split
from vpt.errors import InputError

LOW_BOUND = 0.9  # Dice that the stride should allow


class Segmentation:
    """Masks: a Segmenter, Dice."""

    def read(self, data: SegmentDataConfig) -> MaskData:
        """The data set."""
        return read_masks(data.root, data.masks, data.classes, data.patients)

    def check(self, split: Split) -> None:
        """Refuse training images from which nothing can be learned."""
        images = split.train
        if not any((images.mask(index) > 0).any() for index in range(len(images))):
            raise InputError(
                f"no object in the {len(images)} masks of the train part: raise data.shots, or "
                "label more"
            )

    def describe(self, images: MaskedImages, class_names: list[str]) -> str:
        """Description of the training images' masks."""
        return f"{images.kind} masks of {', '.join(class_names)}"

    def diagnose(
        self, images: MaskedImages, canvas: Canvas, patch: int, class_names: list[str], fixed: bool
    ) -> tuple[dict[str, Any], list[str]]:
        """The Dice that the decoder's stride allows on the training masks, and a line if low."""
        truth = [images.mask(index) for index in range(len(images))]
        bound = upper_bound(truth, canvas, patch // STEP, class_names, images.kind)
        if bound is None or bound >= LOW_BOUND:
            return {}, []
        mend = "" if fixed else ": raise data.size"
        return {}, [
            f"masks at {max(canvas)} px and a stride of {patch // STEP} allow a Dice of {bound:.3f}"
            f" at most{mend}"
        ]

    def model(self, maps: Maps, class_names: list[str], config: SegmentConfig) -> Segmenter:
        """The model to train."""
        return Segmenter(maps, class_names, config.segment, config.data.masks == "instance")

    def targets(
        self, images: MaskedImages, canvas: Canvas, device: torch.device
    ) -> Callable[[int, Flip], Tensor]:
        """Index and flip → class numbers (height, width) on the canvas."""

        def mask(index: int, flip: Flip) -> Tensor:
            numbers = images.mask(index)
            if images.kind == "instance":
                placed = canvas.place_mask(numbers, -1)
                classes = np.where(placed > 0, 1 + border(placed), 0)
                classes[placed < 0] = IGNORED
            else:
                classes = canvas.place_mask(numbers, IGNORED)
            return torch.from_numpy(classes.astype(np.int64)).flip(flip.axes).to(device)

        return mask

    def outputs(self, model: Segmenter, images: CanvasImages, truth: MaskedImages) -> list[Masked]:
        """Masks of the images, at their own size."""
        found = []
        with torch.no_grad():
            for maps in MapSource(model.maps, images).all():
                for logits in model.logits(maps):
                    size = upright_size(images.files[len(found)])
                    found.append(to_image(model, logits, images.canvas, size))
        return found

    def decide(self, model: Segmenter, found: list[Masked], truth: MaskedImages) -> None:
        """Nothing: the likeliest class of a pixel is its class."""

    def metrics(self, model: Segmenter, found: list[Masked], truth: MaskedImages) -> dict[str, Any]:
        """Metrics of result.json."""
        height, width = model.maps.size
        patch = model.maps.method.backbone.patch_size[0]
        masks = [truth.mask(index) for index in range(len(truth))]
        bound = upper_bound(
            masks, Canvas(width, height), patch // STEP, model.class_names, truth.kind
        )
        metrics = mask_metrics(found, masks, model.class_names, truth.kind, truth.patients)
        return {**metrics, "upper_bound": bound}

    def files(self, model: Segmenter, found: list[Masked], truth: MaskedImages) -> dict[str, bytes]:
        """No further files: masks are large."""
        return {}


def to_image(model: Segmenter, logits: Tensor, canvas: Canvas, size: tuple[int, int]) -> Masked:
    """Logits (outputs, height, width) on the canvas as the masks of an image of `size`."""
    width, height = canvas.fitted(size)
    cut = logits[None, :, :height, :width]
    resized = F.interpolate(cut, size[::-1], mode="bilinear")[0].softmax(0).cpu()
    classes = resized.argmax(0).numpy()
    if not model.instances:
        return Masked(classes, None, np.empty(0))
    numbers, scores = objects_of(classes, (1 - resized[0]).numpy())
    return Masked((classes > 0).astype(classes.dtype), numbers, scores)
