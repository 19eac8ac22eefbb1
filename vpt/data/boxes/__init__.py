"""Images with boxes. A layout of files is one file here, found by its name, known by content."""

import csv
import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from vpt import modules
from vpt.data.images import reason
from vpt.errors import InputError, some

_SLACK = 1.0  # pixels that a box may reach beyond its image without a word: rounding
_ORIENTATION, _ON_THE_SIDE = 0x0112, {5, 6, 7, 8}  # EXIF: width and height change places


@dataclass(frozen=True, eq=False)
class BoxedImages:
    """Images with their objects.

    Attributes:
        images: files.
        names: paths below the root.
        boxes: of each image (N, 4) float32: left, top, right, bottom in pixels of the image.
        labels: of each image (N,) int64, class numbers.
        sizes: width and height of each image, upright.
        patients: one an image, where they are known.
    """

    images: list[Path]
    names: list[str]
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    sizes: list[tuple[int, int]]
    patients: list[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | np.ndarray) -> "BoxedImages":
        """The images at `indices`, in that order."""
        columns = {name: values for name, values in vars(self).items() if values is not None}
        return replace(self, **{n: [values[i] for i in indices] for n, values in columns.items()})

    def join(self, other: "BoxedImages") -> "BoxedImages":
        """These images, then those of another part of the same data."""
        both = {k: [*v, *getattr(other, k)] for k, v in vars(self).items() if v is not None}
        return replace(self, **both)

    def class_counts(self, num_classes: int) -> list[int]:
        """Number of objects of each class."""
        labels = np.concatenate([np.empty(0, np.int64), *self.labels])
        return np.bincount(labels, minlength=num_classes).tolist()


class Annotated(NamedTuple):
    """What a layout read of one image: boxes as `BoxedImages` has them, but unchecked."""

    image: Path
    where: str  # the file that says so, for messages
    boxes: list[tuple[float, float, float, float]]
    labels: list[str]
    size: tuple[int, int] | None = None  # as that file says
    patient: str | None = None
    # YOLO's boxes are proportions of the image's sides
    relative: bool = False


class Read(NamedTuple):
    """Result of a layout: parts train, test (and val), or all."""

    class_names: list[str]
    parts: dict[str, list[Annotated]]
    notes: Sequence[str] = ()


class Layout(Protocol):
    """A module of this package."""

    def recognise(self, root: Path) -> bool:
        """True if the files below `root` have this layout."""

    def read(self, root: Path) -> Read:
        """Classes in label order and images with boxes.

        Raises:
            InputError: files that do not have this layout.
        """


class BoxData(NamedTuple):
    """A data set of boxes; `notes` are lines on how its files were understood."""

    layout: str
    class_names: list[str]
    parts: dict[str, BoxedImages]
    notes: list[str]


def read_boxes(root: Path, patients: Path | None = None) -> BoxData:
    """Images with boxes below `root`, by its layout: COCO's JSON, YOLO's texts, Pascal VOC's XML.

    Boxes without area or outside of their image, and those that come twice, are left out; those
    that reach beyond it are cut; the notes name their files.

    Args:
        root: a folder.
        patients: a CSV with the columns image and patient, where the layout names none.

    Raises:
        InputError: no layout or several; files that do not have it; an image that is missing, or of
            another size than its boxes are for; a patient in two parts.
    """
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder: mend the path")
    found = [name for name in modules.names(__name__) if _layout(name).recognise(root)]
    if len(found) != 1:
        what = f"the layouts {' and '.join(found)}" if found else "no boxes"
        raise InputError(
            f"data.root={root}: has {what}: give one of COCO's .json, YOLO's data.yaml with "
            "labels/*.txt, or Pascal VOC's *.xml"
        )
    class_names, parts, notes = _layout(found[0]).read(root)
    used = {label for part in parts.values() for each in part for label in each.labels}
    if unused := [name for name in class_names if name not in used]:
        notes = [*notes, f"classes without a box, which are left out: {some(unused)}"]
    class_names = [name for name in class_names if name in used]
    if not class_names:
        raise InputError(f"data.root={root}: {found[0]} files without any box")
    known = patients and _read_patients(patients)
    odd: dict[str, list[str]] = {}
    checked = {
        part: _check(root, images, class_names, known, odd) for part, images in parts.items()
    }
    _check_patients(checked)
    notes = [*notes, *(f"{len(files)} boxes {kind}: {_say(files)}" for kind, files in odd.items())]
    return BoxData(found[0], class_names, checked, notes)


def _layout(name: str) -> Layout:
    return importlib.import_module(f"{__name__}.{name}")


def _check(
    root: Path,
    images: Sequence[Annotated],
    class_names: Sequence[str],
    patients: Mapping[str, str] | None,
    odd: dict[str, list[str]],
) -> BoxedImages:
    """The images with sound boxes; `odd` takes the files of the others by what is wrong."""
    label_of = {name: label for label, name in enumerate(class_names)}
    boxes, labels, sizes = [], [], []
    for each in images:
        width, height = size = upright_size(each.image)
        if each.size not in (None, size):
            raise InputError(
                f"{each.where}: its boxes are for {each.size[0]}×{each.size[1]} pixels, but "
                f"{each.image} has {width}×{height}: give the original image"
            )
        scale = (width, height, width, height) if each.relative else (1, 1, 1, 1)
        own: dict[tuple[float, ...], None] = {}
        for box, name in zip(each.boxes, each.labels, strict=True):
            whole = np.multiply(box, scale)
            cut = np.clip(whole, 0, (width, height, width, height))
            if not np.isfinite(whole).all() or (whole[2:] <= whole[:2]).any():
                odd.setdefault("without area, left out", []).append(each.where)
            elif (cut[2:] <= cut[:2]).any():
                odd.setdefault("outside of their image, left out", []).append(each.where)
            elif (key := (label_of[name], *cut.tolist())) in own:
                odd.setdefault("that come twice, left out once", []).append(each.where)
            else:
                if np.abs(whole - cut).max() > _SLACK:
                    odd.setdefault("that reach beyond their image, cut", []).append(each.where)
                own[key] = None
        rows = np.array(list(own), np.float32).reshape(-1, 5)
        boxes.append(rows[:, 1:])
        labels.append(rows[:, 0].astype(np.int64))
        sizes.append(size)
    names = [each.image.relative_to(root).as_posix() for each in images]
    files = [each.image for each in images]
    return BoxedImages(files, names, boxes, labels, sizes, _patients_of(images, names, patients))


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file as it is seen, from its header.

    Raises:
        InputError: not an image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _ON_THE_SIDE
            return image.size[::-1] if turned else image.size
    except Exception as error:  # decoders raise anything
        raise InputError(
            f"{path}: not an image that can be read ({reason(error)}): replace or remove it"
        ) from None


def _read_patients(path: Path) -> dict[str, str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return {row["image"]: row["patient"] for row in rows}
    except OSError as error:
        raise InputError(f"data.patients={path}: {error.strerror}: mend the path") from None
    except KeyError as error:
        raise InputError(f"data.patients={path}: no column {error}: give image,patient") from None


def _patients_of(
    images: Sequence[Annotated], names: Sequence[str], patients: Mapping[str, str] | None
) -> list[str] | None:
    found = [each.patient for each in images]
    if patients is not None:
        found = [
            next(
                (patients[key] for key in (n, Path(n).name, Path(n).stem) if key in patients), None
            )
            for n in names
        ]
    missing = [name for name, patient in zip(names, found, strict=True) if not patient]
    if len(missing) == len(found) and patients is None:
        return None
    if missing:
        raise InputError(
            f"{len(missing)} images have no patient, first {missing[0]}: name one for each"
        )
    return found


def _check_patients(parts: Mapping[str, BoxedImages]) -> None:
    for (one, a), (other, b) in itertools.combinations(parts.items(), 2):
        if shared := set(a.patients or ()) & set(b.patients or ()):
            raise InputError(
                f"{len(shared)} patients are in both {one} and {other}: {some(shared)}: move each "
                "to one part"
            )


def _say(files: Sequence[str]) -> str:
    return some(set(files))
