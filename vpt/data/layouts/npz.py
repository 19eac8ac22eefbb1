"""An .npz file of MedMNIST's arrays."""

from pathlib import Path

import numpy as np

from vpt import targets
from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read
from vpt.errors import InputError, some

ROOT = ".npz"


def recognise(root: Path) -> bool:
    """True for an .npz file."""
    return root.is_file() and root.suffix.lower() == ROOT


def read(root: Path, card: Card) -> Read:
    """Arrays PART_images and PART_labels of the parts train, test and, if it is there, val.

    Raises:
        InputError: not such a file.
    """
    try:
        with np.load(root, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception:  # zipfile, zlib and numpy each raise their own
        raise InputError(
            f"{root}: not a whole .npz file of plain arrays: download it again"
        ) from None
    parts = {}
    for part in ("train", "val", "test"):
        if part == "val" and not {"val_images", "val_labels"} & arrays.keys():
            continue
        for key in (f"{part}_images", f"{part}_labels"):
            if key not in arrays:
                raise InputError(f"{root}: no {key} among {some(arrays)}: name it as MedMNIST does")
        parts[part] = _arrays(root, part, arrays[f"{part}_images"], arrays[f"{part}_labels"])
    shapes = {samples.labels.shape[1:] for samples in parts.values()}
    if len(shapes) > 1:
        raise InputError(f"{root}: labels of the parts have different numbers of columns")
    labels = np.concatenate([samples.labels for samples in parts.values()])
    if labels.min(initial=0) < 0:
        raise InputError(f"{root}: label {labels.min()}: labels must count from 0")
    return [str(label) for label in range(targets.of(labels).num_classes(labels))], parts


def _arrays(root: Path, part: str, images: np.ndarray, labels: np.ndarray) -> Samples:
    if images.dtype != np.uint8 or not (images.ndim == 3 or images.shape[3:] == (3,)):
        raise InputError(
            f"{root}: {part}_images is {images.dtype} {images.shape}: it must be uint8 (N, H, W) "
            "or (N, H, W, 3)"
        )
    names = [f"{part}/{i}" for i in range(len(images))]
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == len(images):
        if not np.isin(labels, (0, 1)).all():
            raise InputError(f"{root}: {part}_labels has several columns: all must be 0 or 1")
        return Samples(images, labels.astype(np.float32), names)
    if labels.dtype.kind not in "iu" or labels.shape not in {(len(images),), (len(images), 1)}:
        raise InputError(
            f"{root}: {part}_labels is {labels.dtype} {labels.shape}: it must be {len(images)} "
            "integers, one an image, or a row of 0 and 1"
        )
    return Samples(images, labels.reshape(-1).astype(np.int64), names)
