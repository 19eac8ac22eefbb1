"""Images with boxes. A layout of files is one file here, found by its name, known by content."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vpt import modules
from vpt.data.images import upright_size
from vpt.data.patients import check_patients, patients_of, read_patients
from vpt.errors import InputError, some

_SLACK = 1.0  # pixels that a box may reach beyond its image without a word: rounding


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
    """One image as a layout read it: boxes as `BoxedImages` has them, but unchecked."""

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
    known = patients and read_patients(patients)
    odd: dict[str, list[str]] = {}
    checked = {
        part: _check(root, images, class_names, known, odd) for part, images in parts.items()
    }
    check_patients({part: images.patients for part, images in checked.items()})
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
    return BoxedImages(
        files,
        names,
        boxes,
        labels,
        sizes,
        patients_of(names, [each.patient for each in images], patients),
    )


def _say(files: Sequence[str]) -> str:
    return some(set(files))
