"""A detector: prompted maps, the pyramid, and torchvision's FCOS as the head."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.fcos import FCOS, FCOSHead

from vpt.dense.config import DetectHeadConfig
from vpt.dense.model import Dense
from vpt.dense.pyramid import Maps, Pyramid

# Of a detection. torchvision's own .2 cuts the tail off which average precision counts.
LEAST_SCORE = 0.01


class Objects(NamedTuple):
    """Objects of one image: boxes (N, 4) in its pixels, class numbers (N,), and scores (N,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


class Detector(Dense):
    """Boxes of images (B, channels, height, width), which all have the size of `maps`.

    Places stand at the centres of the cells of three levels, at strides of half, one and two
    patches. A place learns the smallest box around it whose centre is within 1.5 strides and whose
    farthest side is 4 to 8 strides away (on the finest level from 0, on the coarsest without
    bound): FCOS (Tian et al. 2019) with centre sampling, as torchvision has it.

    AP counts boxes below `threshold` too.
    """

    kind = "detect"

    def __init__(self, maps: Maps, class_names: Sequence[str], options: DetectHeadConfig) -> None:
        super().__init__(maps, class_names, options)
        self.threshold = 0.5
        pyramid = Pyramid(maps.width, options.channels)
        head = FCOSHead(options.channels, 1, len(class_names), options.convs)
        self.fcos = make_fcos(pyramid, head, len(class_names), options)

    def outputs(self, maps: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The head's outputs (B, places, …), and the places of each level as squares (N, 4)."""
        levels = self.fcos.backbone(maps)
        return self.fcos.head(levels), self.places(levels)

    def places(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Places of each level as squares (N, 4) of its stride."""
        patch = self.maps.method.backbone.patch_size[0]
        shapes = [level.shape[-2:] for level in levels]
        return place_squares(shapes, patch, levels[0].device)

    def loss(self, maps: Tensor, objects: Sequence[Objects]) -> dict[str, Tensor]:
        """Focal loss of classes, GIoU loss of boxes, cross-entropy of centredness, by name.

        `maps` are what `self.maps` gives for the images, or cached.
        """
        outputs, places = self.outputs(maps)
        targets = [{"boxes": each.boxes, "labels": each.labels} for each in objects]
        counts = [len(level) for level in places]
        return self.fcos.compute_loss(targets, outputs, [torch.cat(places)] * len(maps), counts)

    @torch.no_grad()
    def detect(self, maps: Tensor) -> list[Objects]:
        """Detections in images of these maps, best first, in pixels of `maps.size`."""
        outputs, places = self.outputs(maps)
        counts = [len(level) for level in places]
        split = {name: list(output.split(counts, 1)) for name, output in outputs.items()}
        every, sizes = [places] * len(maps), [self.maps.size] * len(maps)
        found = self.fcos.postprocess_detections(split, every, sizes)
        return [Objects(each["boxes"], each["labels"], each["scores"]) for each in found]

    def forward(self, images: Tensor) -> list[Objects]:
        """Detections in images, best first, in pixels of these."""
        return self.detect(self.maps(images))


def make_fcos(pyramid: Any, head: Any, num_classes: int, options: DetectHeadConfig) -> FCOS:
    """FCOS for its loss, matching and postprocessing: images never pass through its transform."""
    return FCOS(
        pyramid,
        num_classes,
        head=head,
        score_thresh=LEAST_SCORE,
        nms_thresh=options.nms,
        detections_per_img=options.max_detections,
    )


def place_squares(
    shapes: Sequence[tuple[int, int]], patch: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """For each level's rows and columns the places as squares (N, 4) of its stride."""
    squares = []
    for (rows, columns), stride in zip(shapes, (patch // 2, patch, 2 * patch), strict=True):
        y, x = torch.meshgrid(
            torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
        )
        corner = torch.stack([x, y], -1).reshape(-1, 2) * float(stride)
        squares.append(torch.cat([corner, corner + stride], 1))
    return squares
