"""YOLO: data.yaml with class names and parts, and a .txt of each image in labels/."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vpt.data.boxes import Annotated, Read
from vpt.data.boxes._find import read_text
from vpt.data.images import SUFFIXES
from vpt.data.layouts._files import train_and_test
from vpt.errors import InputError
from vpt.settings import read_yaml


def recognise(root: Path) -> bool:
    """True if a .yaml in `root` names classes and a training part."""
    return _description(root) is not None


def read(root: Path) -> Read:
    """Rows are class x y width height, proportions of the image, or a class and a polygon.

    An image without a .txt has no objects.

    Raises:
        InputError: a part that is not there; a row that is something else.
    """
    path, described = _description(root)
    names = described["names"]
    names = dict(enumerate(names)) if isinstance(names, list) else names
    names = {int(number): str(name) for number, name in names.items()}
    parts = {
        part: [_annotated(image, names) for image in _images(path, described, described[part])]
        for part in ("train", "val", "test")
        if described.get(part)
    }
    return Read([names[number] for number in sorted(names)], train_and_test(parts))


def _description(root: Path) -> tuple[Path, dict[str, Any]] | None:
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content: Any = OmegaConf.to_container(read_yaml(path))
        except InputError:
            continue
        if {"names", "train"} <= content.keys():
            return path, content
    return None


def _images(path: Path, described: dict[str, Any], named: Any) -> list[Path]:
    """Images of a part: those of folders, or that a list names."""
    root = path.parent
    images: list[Path] = []
    for name in named if isinstance(named, list) else [named]:
        # its own `path` is often of another machine, and exports begin with a ../ too many
        tried = [root / str(described.get("path", "")) / name, root / name]
        tried += [root / str(name).removeprefix("../")]
        place = next((p for p in tried if p.exists()), None)
        if place is None:
            raise InputError(f"{path}: no {name} in {root}: mend the path")
        if place.is_dir():
            files = sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES)
        else:
            lines = [line.strip() for line in read_text(place).splitlines()]
            files = [place.parent / line for line in lines if line]
        images += files
    return images


def _annotated(image: Path, names: dict[int, str]) -> Annotated:
    folders = list(image.parts)
    if "images" in folders:  # the last of them is labels/ for the texts
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    path = Path(*folders).with_suffix(".txt")
    boxes, labels = [], []
    for number, line in enumerate(read_text(path).splitlines() if path.is_file() else (), 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            numbers = [float(value) for value in values]
            name = names[int(label)]
            if len(numbers) == 4:
                x, y, width, height = numbers
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            elif len(numbers) > 4 and len(numbers) % 2 == 0:
                box = (*(min(numbers[i::2]) for i in (0, 1)), *(max(numbers[i::2]) for i in (0, 1)))
            else:
                raise ValueError
        except (ValueError, KeyError):
            raise InputError(
                f"{path}, line {number}: {line.strip()[:40]!r} is not CLASS X Y WIDTH HEIGHT of "
                f"classes 0 to {max(names)}: mend it"
            ) from None
        boxes.append(box)
        labels.append(name)
    return Annotated(image, path.name, boxes, labels, relative=True)
