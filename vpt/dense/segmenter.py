"""A segmenter: prompted maps and a small decoder to a quarter of the patch size."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.data.masks import IGNORED
from vpt.dense.config import SegmentHeadConfig
from vpt.dense.model import Dense
from vpt.dense.pyramid import Maps, convolution

STEP = 4  # cells of the decoder along a side of a patch


class Segmenter(Dense):
    """Classes of the pixels of images (B, channels, height, width), which have the size of `maps`.

    Attributes:
        class_names: of the classes 1, 2, …; 0 is the background.
        instances: True where objects of one class are told apart, by a class 2 of their borders.
    """

    kind = "segment"

    def __init__(
        self, maps: Maps, class_names: Sequence[str], options: SegmentHeadConfig, instances: bool
    ) -> None:
        super().__init__(maps, class_names, options)
        self.instances = instances
        self.num_outputs = 3 if instances else len(class_names) + 1
        channels = options.channels
        self.decoder = nn.Sequential(
            convolution(maps.width, channels, 1),
            nn.ConvTranspose2d(channels, channels // 2, 2, 2),
            convolution(channels // 2, channels // 2, 3),
            nn.ConvTranspose2d(channels // 2, channels // 2, 2, 2),
            convolution(channels // 2, channels // 2, 3),
            nn.Conv2d(channels // 2, self.num_outputs, 1),
        )

    def logits(self, maps: Tensor) -> Tensor:
        """Logits (B, outputs, height, width) of each pixel."""
        return F.interpolate(self.decoder(maps), self.maps.size, mode="bilinear")

    def loss(self, maps: Tensor, masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Cross-entropy and Dice loss, by name, of masks (height, width) of class numbers."""
        logits, target = self.logits(maps), torch.stack(list(masks))
        counted = (target != IGNORED)[:, None]
        truth = F.one_hot(target.where(counted[:, 0], 0), self.num_outputs).permute(0, 3, 1, 2)
        guess = logits.softmax(1) * counted
        truth = truth * counted
        shared, total = ((x).sum((0, 2, 3)) for x in (guess * truth, guess + truth))
        dice = 1 - (2 * shared + 1) / (total + 1)  # 1: a class that is absent costs nothing
        entropy = F.cross_entropy(logits, target, ignore_index=IGNORED)
        return {"cross_entropy": entropy, "dice": self.options.dice * dice[1:].mean()}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, outputs, height, width) of images."""
        return self.logits(self.maps(images))
