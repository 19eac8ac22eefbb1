"""scikit-learn's bundled digits; no root."""

from pathlib import Path

import numpy as np

from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read

ROOT = None


def recognise(root: Path) -> bool:
    """False: they have no files."""
    return False


def read(root: None, card: Card) -> Read:
    """All 1,797 digits, as one part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"all/{i}" for i in range(len(images))]
    class_names = [str(name) for name in digits.target_names]
    return class_names, {"all": Samples(images, digits.target.astype(np.int64), names)}
