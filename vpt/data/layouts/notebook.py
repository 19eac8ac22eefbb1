"""scikit-learn's bundled digits in ink on ruled paper; no root."""

from pathlib import Path

import numpy as np
from PIL import Image

from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read, digits

ROOT = None
SIDE = 32
PAPER, RULE = (250, 245, 225), (150, 180, 220)
INKS = np.array([(20, 30, 120), (120, 20, 30), (20, 20, 20)])


def recognise(root: Path) -> bool:
    """False: they have no files."""
    return False


def read(root: None, card: Card) -> Read:
    """All 1,797 digits, as one part."""
    class_names, parts = digits.read(root, card)
    samples = parts["all"]
    # NumPy never changes these draws
    images = [_write(own, np.random.RandomState(i)) for i, own in enumerate(samples.images)]
    return class_names, {"all": Samples(np.stack(images), samples.labels, samples.names)}


def _write(digit: np.ndarray, draws: np.random.RandomState) -> np.ndarray:
    """A digit (8, 8), white on black, as a page (SIDE, SIDE, 3)."""
    large = Image.fromarray(digit).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    ink = np.asarray(large)[..., None] / 255
    page = np.broadcast_to(np.array(PAPER, float), (SIDE, SIDE, 3)).copy()
    page[draws.randint(8) :: 8] = RULE
    return np.rint(page * (1 - ink) + INKS[draws.randint(len(INKS))] * ink).astype(np.uint8)
