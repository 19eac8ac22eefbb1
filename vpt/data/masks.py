"""Images with masks: a folder of images and one of masks beside it, of the same names."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from vpt.data.boxes._find import split_part
from vpt.data.images import SUFFIXES, reason
from vpt.data.layouts._files import train_and_test
from vpt.data.patients import check_patients, patients_of, read_patients
from vpt.errors import InputError

Masks = Literal["class", "instance"]
IGNORED = 255  # a pixel of a class mask that does not count
_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentations", "gt")
_MOST = 250  # classes


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Images with a mask each.

    Attributes:
        images, masks: files.
        names: paths below the root.
        kind: class: a pixel has its class number, 0 for background; instance: a number an object.
        binary: 255 in the place of class 1.
        patients: one an image, where they are known.
    """

    images: list[Path]
    masks: list[Path]
    names: list[str]
    kind: Masks
    binary: bool = False
    patients: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | np.ndarray) -> "MaskedImages":
        """The images at `indices`, in that order."""
        lists = {name: values for name, values in vars(self).items() if isinstance(values, list)}
        return replace(self, **{n: [values[i] for i in indices] for n, values in lists.items()})

    def join(self, other: "MaskedImages") -> "MaskedImages":
        """These images, then those of another part of the same data."""
        lists = {name: values for name, values in vars(self).items() if isinstance(values, list)}
        return replace(self, **{n: [*values, *getattr(other, n)] for n, values in lists.items()})

    def mask(self, index: int) -> np.ndarray:
        """Numbers (height, width) int32 of one image's pixels."""
        mask = read_mask(self.masks[index])
        return (mask == IGNORED).astype(np.int32) if self.binary else mask

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each image."""
        return [_size(path) for path in self.masks]


class MaskData(NamedTuple):
    """A data set of masks; `notes` are lines on how its files were understood."""

    layout: str
    class_names: list[str]
    parts: dict[str, MaskedImages]
    notes: list[str]


def read_masks(
    root: Path, kind: Masks, classes: Sequence[str] | None = None, patients: Path | None = None
) -> MaskData:
    """Images in folders called images, masks of the same stems in masks/ or labels/ beside each.

    Parts are folders called train, val and test above or below these. Every mask is read once.

    Args:
        root: a folder.
        kind: what the numbers of masks are; nothing in the files tells it.
        classes: names of the classes 1, 2, …; None: these numbers. Instances are of one class.
        patients: a CSV with the columns image and patient.

    Raises:
        InputError: no such folders; an image without a mask, a mask of another size or in colours;
            more classes than names.
    """
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    for image in sorted(root.rglob("*")):
        folders = image.relative_to(root).parts[:-1]
        if image.suffix.lower() not in SUFFIXES or "images" not in folders:
            continue
        part = split_part("/".join(folders)) or "train"
        pairs.setdefault(part, []).append((image, _beside(root, image)))
    if not pairs:
        raise InputError(f"data.root={root}: no images/ with {_FOLDERS[0]}/ beside it: give both")
    seen: set[int] = set()
    for image, path in (pair for part in pairs.values() for pair in part):
        mask = read_mask(path)
        if mask.shape[::-1] != _size(image):
            raise InputError(
                f"{path}: {mask.shape[::-1]} pixels, its image {_size(image)}: mend it"
            )
        seen.update(np.unique(mask).tolist() if kind == "class" else ())
    binary = kind == "class" and seen <= {0, IGNORED} and IGNORED in seen
    numbers = {1} if binary or kind == "instance" else seen - {0, IGNORED}
    most = max(numbers, default=0)
    if not 0 < most <= _MOST:
        raise InputError(f"data.root={root}: class numbers up to {most}: give 1 to {_MOST}")
    if classes is not None and len(classes) < most:
        raise InputError(f"data.classes has {len(classes)} names, but masks {most} classes")
    names = list(classes or map(str, range(1, most + 1)))
    notes = ["masks have 0 and 255 alone, so 255 is class 1"] if binary else []
    table, parts = patients and read_patients(patients), {}
    for part, own in pairs.items():
        images, masks = map(list, zip(*own, strict=True))
        paths = [image.relative_to(root).as_posix() for image in images]
        known = patients_of(paths, [None] * len(paths), table)
        parts[part] = MaskedImages(images, masks, paths, kind, binary, known)
    check_patients({part: images.patients for part, images in parts.items()})
    return MaskData(f"{kind} masks", names, train_and_test(parts), notes)


def read_mask(path: Path) -> np.ndarray:
    """Numbers (height, width) int32 of a mask's pixels.

    Raises:
        InputError: it can't be read, or has colours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mask = np.asarray(image)
    except Exception as error:  # decoders raise anything
        raise InputError(
            f"{path}: not a mask that can be read ({reason(error)}): replace it"
        ) from None
    if mask.ndim != 2:
        raise InputError(f"{path}: a mask in colours: give one of numbers, grey or with a palette")
    return mask.astype(np.int32)


def _beside(root: Path, image: Path) -> Path:
    parts = list(image.parts)
    place = len(parts) - 1 - parts[::-1].index("images")
    for name in _FOLDERS:
        folder = Path(*parts[:place], name, *parts[place + 1 : -1])
        found = sorted(folder.glob(f"{image.stem}.*")) if folder.is_dir() else []
        if len(found) == 1:
            return found[0]
    raise InputError(f"{image}: no one mask of this name in {', '.join(_FOLDERS[:3])}: add it")


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
