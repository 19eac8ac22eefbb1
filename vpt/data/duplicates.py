"""Test images that training has seen: copies and near-copies, found by perceptual hash."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import imagehash
import numpy as np

from vpt.data.fewshot import Split
from vpt.data.images import Samples
from vpt.data.pixels import Range

# Measured on test images that are no copies: none of 1,637 digits, 624 PneumoniaMNIST and 4,400
# Tiny ImageNet images is taken for one. With 8 × 8 bits some are; with 16 × 16, more half-size and
# strongly compressed copies of images of 32 pixels are missed.
_SIDE = 12  # the hash has 12 × 12 bits
_MOST_BITS = 10  # by which a copy may differ
_LEAST_PIXELS = 96  # a side, for the hash's low frequencies


class Duplicate(NamedTuple):
    """A test image, the image most like it that training has seen, and the bits they differ by.

    Among calibration images, `test` is one of them.
    """

    test: str
    train: str
    bits: int


def find_duplicates(split: Split, grey: Range | None = None) -> list[Duplicate]:
    """Test images that are a copy of an image of another part, most alike first.

    Calibration images are looked for in training and validation, and count as seen for the test.

    Perceptual hash (pHash: signs of the lowest DCT frequencies) of 144 bits; up to 10 may differ.
    The same pixels always have the same hash, and resized and re-encoded copies are found;
    mirrored and cropped ones are not. Other pictures of the same thing are found too where they
    differ no more than a copy does, such as two frames of one ultrasound scan. Blank images are
    left out: all of them would be copies of each other. Grey images with more than 8 bits are read
    through `grey`.

    Raises:
        InputError: an image that can't be read.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    seen = _hashes(split.train, grey) + _hashes(split.val, grey)
    pairs = []
    for samples in (split.calibration, split.test):
        own = _hashes(samples, grey)
        if own and seen:
            hashes = ([bits for _, bits in images] for images in (own, seen))
            nearest, distance = pairwise_distances_argmin_min(*hashes)
            bits = np.rint(distance**2).astype(int)  # of 0/1 vectors: the bits that differ
            pairs += [
                Duplicate(own[i][0], seen[nearest[i]][0], int(bits[i]))
                for i in np.flatnonzero(bits <= _MOST_BITS)
            ]
        seen += own
    return sorted(pairs, key=lambda pair: pair.bits)


def _hashes(samples: Samples | None, grey: Range | None) -> list[tuple[str, np.ndarray]]:
    """Names of the images that are not blank, each with its hash as 144 zeros and ones."""
    if samples is None:
        return []
    with ThreadPoolExecutor() as pool:  # Pillow's decoders release the GIL
        hashes = list(pool.map(partial(_hash, samples, grey), range(len(samples))))
    return [(n, bits) for n, bits in zip(samples.names, hashes, strict=True) if bits is not None]


def _hash(samples: Samples, grey: Range | None, index: int) -> np.ndarray | None:
    image = samples.read(index, _LEAST_PIXELS, grey).convert("L")
    darkest, brightest = image.getextrema()
    if darkest == brightest:
        return None
    return imagehash.phash(image, hash_size=_SIDE).hash.reshape(-1).astype(np.float32)
