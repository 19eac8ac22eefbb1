"""Images and their maps for training: on the canvas, flipped, and computed once where nothing
that trains changes them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vpt.backbones.base import Backbone
from vpt.data.images import read_image
from vpt.data.loaders import CACHE_BYTES, ImageStore
from vpt.dense.canvas import Canvas, fill_colour
from vpt.dense.map_files import MapFiles
from vpt.dense.pyramid import Maps

EVAL_BATCH = 16


class Flip(NamedTuple):
    """How the canvas of an image is turned over."""

    horizontal: bool = False
    vertical: bool = False

    @property
    def axes(self) -> list[int]:
        """Axes of (…, H, W) that are turned."""
        return [axis for axis, turned in ((-1, self.horizontal), (-2, self.vertical)) if turned]


class CanvasImages:
    """Image files as the backbone takes them, at the size of the canvas."""

    def __init__(self, files: Sequence[Path], canvas: Canvas, backbone: Backbone) -> None:
        self.files, self.canvas, self.backbone = list(files), canvas, backbone
        self._fill = fill_colour(backbone)
        self._store = ImageStore(CACHE_BYTES)

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Sequence[int], flips: Sequence[Flip] | None = None) -> Tensor:
        """Normalised images (B, channels, height, width)."""
        flips = flips or [Flip()] * len(indices)
        pixels = torch.from_numpy(np.stack([self._pixels(index) for index in indices]))
        images = self.backbone.preprocess.normalize(pixels)
        pairs = zip(images, flips, strict=True)
        return torch.stack([image.flip(flip.axes) for image, flip in pairs]).to(
            self.backbone.device
        )

    def _pixels(self, index: int) -> np.ndarray:
        file = self.files[index]
        grey = self.backbone.preprocess.grey_range
        return self._store.get(
            (True, index), lambda: self.canvas.place(read_image(file, grey=grey), self._fill)
        )


class MapSource:
    """Maps of images: with gradients where these train, else computed once and kept.

    They are kept in memory, up to CACHE_BYTES, and in `folder`, where one is given.
    """

    def __init__(self, maps: Maps, images: CanvasImages, folder: Path | None = None) -> None:
        self.maps, self.images = maps, images
        self._files = MapFiles(folder, maps) if folder and maps.frozen else None
        self._store = ImageStore(CACHE_BYTES)

    def batch(self, indices: Sequence[int], flips: Sequence[Flip]) -> Tensor:
        """Maps (B, width, rows, columns) of flipped images."""
        if not self.maps.frozen:
            return self.maps(self.images.batch(indices, flips))
        pairs = zip(indices, flips, strict=True)
        kept = [self._store.get((index, flip), lambda i=index, f=flip: self._one(i, f))
                for index, flip in pairs]  # fmt: skip
        return torch.stack(kept)

    @torch.no_grad()
    def _one(self, index: int, flip: Flip) -> Tensor:
        image = self.images.batch([index], [flip])
        return (self._files.get(image, self.maps) if self._files else self.maps(image))[0]

    @torch.no_grad()
    def all(self) -> Iterator[Tensor]:
        """Maps of all images in order, in batches."""
        for begin in range(0, len(self.images), EVAL_BATCH):
            indices = range(begin, min(begin + EVAL_BATCH, len(self.images)))
            yield self.maps(self.images.batch(indices))
