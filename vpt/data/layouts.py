"""Readers of users' own data: files below a root → class names in label order, and samples."""

import csv
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from vpt.data.cards import Card
from vpt.data.images import Samples, find_images, is_hidden
from vpt.errors import InputError

Read = tuple[list[str], dict[str, Samples]]
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def some(names: Collection[str]) -> str:
    """The first five names, sorted."""
    return ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")


def read_digits(root: None, card: Card) -> Read:
    """scikit-learn's bundled digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    names = [f"all/{i}" for i in range(len(images))]
    class_names = [str(name) for name in digits.target_names]
    return class_names, {"all": Samples(images, digits.target.astype(np.int64), names)}


def read_folder(root: Path, card: Card) -> Read:
    """Class folders, or train/, val/ and test/ of them.

    Raises:
        InputError: neither, an empty class, or parts whose classes differ.
    """
    folders = _subfolders(root)
    # a class may be called train: a part holds class folders
    named = [f for f in folders if f.name.lower() in _PARTS and _subfolders(f)]
    by_part = {_PARTS[f.name.lower()]: f for f in named}
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
    return class_names, _train_and_test(parts)


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


def read_csv(root: Path, card: Card) -> Read:
    """Lines `path,label[,split][,patient]`, paths from the file's folder.

    Raises:
        InputError: a line that is none of these, a missing image, no line for training.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    lines: dict[str, int] = {}
    for line, row in _csv_rows(root):
        where = f"{root}, line {line}"
        for column in ("path", "label", "patient"):
            if row.get(column) == "":
                raise InputError(f"{where}: {column} is empty: fill it or remove the line")
        part = row.get("split", "train")
        if part not in _PARTS:
            raise InputError(f"{where}: split={part!r}: write train, val or test")
        if not (root.parent / row["path"]).is_file():
            raise InputError(f"{where}: {row['path']}: no such file: mend the path")
        row["path"] = Path(os.path.relpath(root.parent / row["path"], root.parent)).as_posix()
        if lines.setdefault(row["path"], line) != line:
            raise InputError(
                f"{where}: {row['path']} is already in line {lines[row['path']]}: remove one"
            )
        rows.setdefault(_PARTS[part], []).append(row)
    if "train" not in rows:
        raise InputError(f"{root}: no line for training: add path,label lines (split: train)")
    labels = {row["label"] for part in rows.values() for row in part}
    numbers = all(label.isdecimal() for label in labels)
    class_names = sorted(labels, key=int if numbers else str)
    index = {name: label for label, name in enumerate(class_names)}
    parts = {}
    for part, chosen in rows.items():
        patients = [row["patient"] for row in chosen] if "patient" in chosen[0] else None
        files = [(row["path"], index[row["label"]]) for row in chosen]
        parts[part] = samples_of(root.parent, files, patients)
    return class_names, _train_and_test(parts)


def _csv_rows(root: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with root.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
            for column in ("path", "label"):
                if column not in columns:
                    raise InputError(
                        f"{root}, line 1: no column {column!r} in {','.join(columns)!r}: the "
                        "header is path,label[,split][,patient]"
                    )
            for row in reader:
                yield reader.line_num, {column: row[column].strip() for column in columns}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{root}: not CSV in UTF-8 ({error}): save it as such") from None


def read_npz(root: Path, card: Card) -> Read:
    """MedMNIST's arrays.

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
    if labels.ndim == 2:
        return [str(label) for label in range(labels.shape[1])], parts
    if labels.min(initial=0) < 0:
        raise InputError(f"{root}: label {labels.min()}: labels must count from 0")
    return [str(label) for label in range(labels.max(initial=0) + 1)], parts


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


def samples_of(
    root: Path, files: Sequence[tuple[str, int]], patients: list[str] | None = None
) -> Samples:
    """Samples of (path below `root`, label) pairs."""
    names = [name for name, _ in files]
    labels = np.array([label for _, label in files], dtype=np.int64)
    return Samples([root / name for name in names], labels, names, patients)


def _train_and_test(parts: dict[str, Samples]) -> dict[str, Samples]:
    if "test" in parts:
        return parts
    if "val" in parts:  # train/ and val/ alone, as in ImageNet: what is held out is the test
        return {"train": parts["train"], "test": parts["val"]}
    return {"all": parts["train"]}
