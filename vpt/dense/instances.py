"""Objects of one class told apart: borders to learn, and objects from what is predicted."""

import numpy as np
from scipy import ndimage

_NEAR = 2  # pixels that a border is wide, on either side


def border(numbers: np.ndarray) -> np.ndarray:
    """True (h, w) where a pixel of an object is near another object, in numbers (h, w)."""
    side = 2 * _NEAR + 1
    highest = ndimage.maximum_filter(numbers, side)
    others = np.where(numbers > 0, numbers, np.iinfo(numbers.dtype).max)
    lowest = ndimage.minimum_filter(others, side)
    return (numbers > 0) & ((highest != numbers) | (lowest != numbers))


def objects_of(classes: np.ndarray, foreground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Objects, numbered from 1 (h, w), and their scores, of classes 1 (inside) and 2 (border).

    A connected inside is an object, to which the border nearest to it belongs. Its score is the
    mean probability `foreground` (h, w) of its pixels.
    """
    numbers, count = ndimage.label(classes == 1)
    if not count:
        return numbers, np.empty(0)
    nearest = ndimage.distance_transform_edt(
        numbers == 0, return_distances=False, return_indices=True
    )
    grown = np.where(classes > 0, numbers[tuple(nearest)], 0)
    return grown, ndimage.mean(foreground, grown, np.arange(1, count + 1))
