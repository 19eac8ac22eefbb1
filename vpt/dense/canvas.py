"""Images of any size on a canvas of one: resized once, antialiased, aspect kept, padded."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from vpt.backbones.base import Backbone
from vpt.errors import InputError

SIZE = 320  # of the longer side


class Canvas(NamedTuple):
    """A width and height in pixels that images are fitted into, at its left top."""

    width: int
    height: int

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an image of `size` on the canvas."""
        scale = min(self.width / size[0], self.height / size[1])
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    def scale(self, size: tuple[int, int]) -> np.ndarray:
        """(4,): what box corners of an image of `size` are multiplied by."""
        width, height = self.fitted(size)
        return np.array([width / size[0], height / size[1]] * 2, np.float32)

    def place(self, image: Image.Image, fill: tuple[int, int, int]) -> np.ndarray:
        """The image on the canvas, uint8 (height, width, 3), the rest of colour `fill`."""
        canvas = Image.new("RGB", (self.width, self.height), fill)
        canvas.paste(image.resize(self.fitted(image.size), Image.Resampling.BICUBIC))
        return np.array(canvas)  # writable, as tensors want it

    def place_mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """Class numbers (h, w) on the canvas (height, width) by the nearest pixel; rest `fill`."""
        width, height = self.fitted(mask.shape[::-1])
        rows = (np.arange(height) + 0.5) * mask.shape[0] // height
        columns = (np.arange(width) + 0.5) * mask.shape[1] // width
        canvas = np.full((self.height, self.width), fill, mask.dtype)
        canvas[:height, :width] = mask[np.ix_(rows.astype(int), columns.astype(int))]
        return canvas


def choose_canvas(
    backbone: Backbone, sizes: Iterable[tuple[int, int]], longer: int | None
) -> Canvas:
    """The smallest canvas that images of these sizes fit into with longer sides of `longer`.

    Its sides are multiples of two patches, the coarsest stride. A backbone that takes one size has
    its own, square.

    Raises:
        InputError: another size than the one that the backbone takes.
    """
    own = backbone.preprocess.image_size
    if not backbone.takes_sizes:
        if longer not in (None, own):
            raise InputError(
                f"data.size={longer}: {backbone.family} takes images of {own} pixels alone: drop it"
            )
        return Canvas(own, own)
    longer, step = longer or SIZE, 2 * backbone.patch_size[0]
    fitted = [(w * longer / max(w, h), h * longer / max(w, h)) for w, h in sizes]
    sides = (max(side) for side in zip(*fitted, strict=True))
    return Canvas(*(math.ceil(round(side) / step) * step for side in sides))


def fill_colour(backbone: Backbone) -> tuple[int, int, int]:
    """The backbone's mean colour, which is 0 once it is normalised."""
    mean = backbone.preprocess.mean
    return tuple(round(255 * value) for value in (mean * 3 if len(mean) == 1 else mean))
