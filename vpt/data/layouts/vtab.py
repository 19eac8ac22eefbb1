"""VTAB-1k's `train800.txt`, `val200.txt` and `test.txt`: a path and a label a line."""

from collections import Counter
from pathlib import Path

from vpt.data.cards import Card
from vpt.data.layouts import Read
from vpt.data.layouts._published import parts_of, read_text
from vpt.errors import InputError

ROOT = "folder"
_LISTS = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}


def recognise(root: Path) -> bool:
    """False: only a card says how many classes the lists have."""
    return False


def read(root: Path, card: Card) -> Read:
    """The three lists; classes are numbers below the card's `num_classes`.

    Raises:
        InputError: a list or an image of it is missing, or it is not such a list.
    """
    files = {part: _list(root / name, card) for part, name in _LISTS.items()}
    both = root / "train800val200.txt"
    # The paths differ where the dump holds the 1,000 images a second time.
    if both.is_file() and _labels(_list(both, card)) != _labels(files["train"] + files["val"]):
        raise InputError(
            f"{both}: its labels are not those of train800.txt and val200.txt: {card.get}"
        )
    return [str(label) for label in range(card.num_classes or 0)], parts_of(root, files, card)


def _list(path: Path, card: Card) -> list[tuple[str, int]]:
    rows = []
    for number, line in enumerate(read_text(path, card).splitlines(), start=1):
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
