"""A folder of class folders, or train/ + val/ + test/ of them."""

from pathlib import Path

from vpt.data.cards import Card
from vpt.data.images import find_images, is_hidden, samples_of
from vpt.data.layouts import Read
from vpt.data.layouts._files import PARTS, train_and_test
from vpt.errors import InputError, some

ROOT = "folder"


def recognise(root: Path) -> bool:
    """True for any folder."""
    return root.is_dir()


def read(root: Path, card: Card) -> Read:
    """Class folders, or train/, val/ and test/ of them.

    Raises:
        InputError: neither, an empty class, or parts whose classes differ.
    """
    folders = _subfolders(root)
    # a class may be called train: a part holds class folders
    named = [f for f in folders if f.name.lower() in PARTS and _subfolders(f)]
    by_part = {PARTS[f.name.lower()]: f for f in named}
    if len(by_part) < len(named):
        raise InputError(f"{root}: two folders for one part, {some([f.name for f in named])}")
    if "train" in by_part:
        found = {part: _class_folders(folder) for part, folder in by_part.items()}
    elif named and len(named) == len(folders):
        raise InputError(f"{root}: {folders[0].name}/ but no train/: add train/ beside it")
    else:
        found = {"train": _class_folders(root)}
    class_names = sorted(found["train"])
    parts = {}
    for part, classes in found.items():
        differing = classes.keys() ^ found["train"].keys()
        if differing:
            raise InputError(
                f"{root}: class folders of train and {part} differ: only one of them has "
                f"{some(differing)}: give both the same"
            )
        files = [
            (path.relative_to(root).as_posix(), label)
            for label, name in enumerate(class_names)
            for path in classes[name]
        ]
        parts[part] = samples_of(root, files)
    return class_names, train_and_test(parts)


def _class_folders(folder: Path) -> dict[str, list[Path]]:
    classes = {subfolder.name: find_images(subfolder) for subfolder in _subfolders(folder)}
    if not classes and find_images(folder):
        raise InputError(
            f"{folder}: the images lie directly in it: move them into one folder a class"
        )
    if not classes:
        raise InputError(f"{folder}: no class folders: put the images into one folder a class")
    for name, images in classes.items():
        if not images:
            raise InputError(f"{folder / name}: class folder without images: fill or remove it")
    return classes


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
