"""Readers of published split files, as they are: CoOp's, VTAB-1k's and the FGVC sets' of VPT."""

import json
from collections import Counter
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read, read_folder, samples_of, some
from vpt.errors import InputError

_PARTS = ("train", "val", "test")
_VTAB_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
_FGVC_JSON = TypeAdapter(dict[str, int])


def read_zhou(root: Path, card: Card) -> Read:
    """CoOp's `split_zhou_*.json` beside a folder of images.

    Raises:
        InputError: the file or an image of it is missing, or it is not such a file.
    """
    path = root / str(card.split_file)
    text = _read(path, card)
    try:
        split = json.loads(text)
        rows = [
            (part, f"{card.images}/{file}", int(label), str(name))
            for part in _PARTS
            for file, label, name in split[part]
        ]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{path}: not {{"train": [[path, label, class], …], "val": …, "test": …}}: {card.get}'
        ) from None
    class_names = dict(sorted({label: name for _, _, label, name in rows}.items()))
    if list(class_names) != list(range(len(class_names))):
        raise InputError(f"{path}: labels are not 0 to {len(class_names) - 1}: {card.get}")
    files = {part: [(file, label) for p, file, label, _ in rows if p == part] for part in _PARTS}
    return list(class_names.values()), _parts(root, files, card)


def read_vtab(root: Path, card: Card) -> Read:
    """VTAB-1k's lists: a path and a label a line.

    Raises:
        InputError: a list or an image of it is missing, or it is not such a list.
    """
    files = {part: _vtab_list(root / name, card) for part, name in _VTAB_LISTS.items()}
    both = root / "train800val200.txt"
    # The paths differ where the dump holds the 1,000 images a second time.
    if both.is_file() and _labels(_vtab_list(both, card)) != _labels(files["train"] + files["val"]):
        raise InputError(
            f"{both}: its labels are not those of train800.txt and val200.txt: {card.get}"
        )
    return [str(label) for label in range(card.num_classes or 0)], _parts(root, files, card)


def _vtab_list(path: Path, card: Card) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(_read(path, card).splitlines(), start=1):
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal() or int(label) >= (card.num_classes or 0):
            raise InputError(
                f"{path}, line {number}: {line!r} is not a path and a label below "
                f"{card.num_classes}: {card.get}"
            )
        rows.append((file, int(label)))
    return rows


def _labels(rows: list[tuple[str, int]]) -> Counter[int]:
    return Counter(label for _, label in rows)


def read_fgvc(root: Path, card: Card) -> Read:
    """VPT's `train.json`, `val.json` and `test.json`, or folders in their place.

    Raises:
        InputError: a file or an image of it is missing, or it is not such a file.
    """
    if not (root / "train.json").is_file():
        if not (root / "train").is_dir():
            raise InputError(f"{root}: neither train.json nor train/: {card.get}")
        return read_folder(root, card)
    numbers = {part: _fgvc_json(root / f"{part}.json", card) for part in _PARTS}
    # Class numbers need not count from 0, and may have gaps.
    known = sorted({number for part in numbers.values() for number in part.values()})
    label = {number: index for index, number in enumerate(known)}
    files = {
        part: [((Path(card.images or "") / file).as_posix(), label[n]) for file, n in rows.items()]
        for part, rows in numbers.items()
    }
    return [str(number) for number in known], _parts(root, files, card)


def _fgvc_json(path: Path, card: Card) -> dict[str, int]:
    try:
        return _FGVC_JSON.validate_json(_read(path, card))
    except ValidationError:
        raise InputError(f'{path}: not {{"path": class number, …}}: {card.get}') from None


def _read(path: Path, card: Card) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: {card.get}") from None


def _parts(root: Path, files: dict[str, list[tuple[str, int]]], card: Card) -> dict[str, Samples]:
    """The parts of a published split, whose files must all be there, the test's in it alone."""
    names = {part: [name for name, _ in rows] for part, rows in files.items()}
    for part, listed in names.items():
        missing = [name for name in listed if not (root / name).is_file()]
        if missing:
            raise InputError(
                f"{root}: {len(missing)} files of the {part} list are missing, first "
                f"{missing[0]}: {card.get}"
            )
    shared = {*names["train"], *names["val"]} & {*names["test"]}
    if shared:
        raise InputError(
            f"{root}: {len(shared)} test images are in train or val, {some(shared)}: {card.get}"
        )
    return {part: samples_of(root, rows) for part, rows in files.items()}
