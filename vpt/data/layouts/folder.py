"""A folder of class folders, or train/ + val/ + test/ of them."""

import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read
from vpt.data.layouts._files import part_of, train_and_test
from vpt.data.search import Found, matches, say, search, subfolders
from vpt.errors import InputError, some

ROOT = "folder"
_PART = re.compile(r"train|val|test|dev", re.IGNORECASE)
Classes = dict[str, dict[str, Path]]  # class: name of an image: its file


def recognise(root: Path) -> bool:
    """True for any folder."""
    return root.is_dir()


def read(root: Path, card: Card) -> Read:
    """Class folders, or train/, val/ and test/ of them, by any usual spelling.

    Raises:
        InputError: neither, an empty class, a class that train lacks, or folders in the place of
            classes that all hold the same folders.
    """
    found = search(root, card.exclude, card.include)
    parts = _parts(root, card, found)
    if parts:
        classes = {part: _classes(root / name, root, card, found) for part, name in parts.items()}
        _check_others(root, parts, classes["train"], found)
    else:
        classes = {"train": _classes(root, root, card, found)}
        _check_apart(root, classes["train"])
    class_names = sorted(classes["train"])
    samples = {}
    for part, images in classes.items():
        if images.keys() - set(class_names):  # a test without images of a class is one, though
            differing = some(images.keys() ^ set(class_names))
            raise InputError(
                f"{root}: class folders of train and {part} differ: only one of them has "
                f"{differing}: give both the same"
            )
        label = {name: label for label, name in enumerate(class_names)}
        rows = [(*row, label[name]) for name in sorted(images) for row in images[name].items()]
        labels = np.array([label for _, _, label in rows], dtype=np.int64)
        samples[part] = Samples([path for _, path, _ in rows], labels, [name for name, *_ in rows])
    unused = [p for p in card.include if not any(matches(name, p) for name in found.kept)]
    notes = [f"nothing that would be left out matches data.include={p}" for p in unused]
    return Read(class_names, train_and_test(samples), found.left_out, notes)


def _parts(root: Path, card: Card, found: Found) -> dict[str, str]:
    """Folder of each part, or none where the folders are classes."""
    folders = _own(root, root, card)
    # a class may be called train: a part holds class folders
    named = {f: part for f in folders if (part := part_of(f)) and _own(root / f, root, card)}
    by_part = {part: folder for folder, part in named.items()}
    if len(by_part) < len(named):
        raise InputError(f"{root}: two folders for one part, {', '.join(named)}")
    if "train" in by_part:
        return by_part
    if named and len(named) == len(folders):
        raise InputError(f"{root}: {next(iter(named))}/ but no train/: add train/ beside it")
    return {}


def _own(folder: Path, root: Path, card: Card) -> list[str]:
    """Names of the folders in `folder` but those that the card excludes."""
    return [
        name
        for name, paths in subfolders(folder).items()
        if not any(matches(paths[0].relative_to(root).as_posix(), p) for p in card.exclude)
    ]


def _classes(folder: Path, root: Path, card: Card, found: Found) -> Classes:
    """Images of each class folder in `folder`; images outside of them count as left out."""
    before = f"{folder.relative_to(root).as_posix()}/" if folder != root else ""
    classes: Classes = {name: {} for name in _own(folder, root, card)}
    direct = []
    for name, path in found.images.items():
        if name.startswith(before):
            first, slash, _ = name.removeprefix(before).partition("/")
            if slash:
                classes.setdefault(first, {})[name] = path
            else:
                direct.append(name)
    if not classes and direct:
        raise InputError(
            f"{folder}: the images lie directly in it: move them into one folder a class"
        )
    if not classes:
        raise InputError(f"{folder}: no class folders: put the images into one folder a class")
    for name, images in classes.items():
        if not images:
            below = {p: k for p, k in found.left_out.items() if p.startswith(f"{before}{name}/")}
            raise InputError(
                f"{folder / name}: class folder without images{say(below, ', but ')}: fill or "
                "remove it, or leave it out by data.exclude"
            )
    found.left_out.update(dict.fromkeys(direct, "images outside class folders"))
    return classes


def _check_others(root: Path, parts: dict[str, str], train: Classes, found: Found) -> None:
    """Refuses a folder beside the parts that holds the same classes; others count as left out."""
    for name in found.images:
        folder, _, rest = name.partition("/")
        if folder in parts.values():
            continue
        if rest.partition("/")[0] in train:
            raise InputError(
                f"{root}: {folder}/ holds classes of {parts['train']}/, but is no part: call it "
                f"train, val or test, or give data.exclude={folder}"
            )
        found.left_out[name] = f"images outside {', '.join(parts.values())}"


def _first_folders(images: Collection[str]) -> set[str]:
    """Folders in the first folder of a class that holds more than one other."""
    folders = [name.split("/")[1:-1] for name in images]
    while len(first := {tuple(path[:1]) for path in folders}) == 1 and first != {()}:
        folders = [path[1:] for path in folders]
    return {folder for path in first for folder in path}


def _check_apart(root: Path, classes: Classes) -> None:
    """Refuses folders that all hold the same folders, which are more likely the classes."""
    inside = [_first_folders(images) for images in classes.values()]
    common = set.intersection(*inside)
    alike = common == max(inside, key=len)
    # parts of unknown spelling, one of which lacks a class
    parts = common in inside and any(_PART.search(name) for name in classes)
    if len(inside) > 1 and len(common) > 1 and (alike or parts):
        raise InputError(
            f"{root}: its folders {some(classes)} all hold the folders {some(common)}: call them "
            "train, val and test if they are parts, give data.root=FOLDER for one of them or "
            "data.exclude for what is no image, or write a CSV if they are classes"
        )
