"""Published split files, shared by the layouts that have them."""

from pathlib import Path

from vpt.data.cards import Card
from vpt.data.images import Samples, located, samples_of
from vpt.errors import InputError, some

PARTS = ("train", "val", "test")


def read_text(path: Path, card: Card) -> str:
    """Content of a split file.

    Raises:
        InputError: it is missing.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: {card.get}") from None


def parts_of(root: Path, files: dict[str, list[tuple[str, int]]], card: Card) -> dict[str, Samples]:
    """Samples of the parts of a published split, from (path below `root`, label) pairs.

    Raises:
        InputError: a file is missing, or a test image is in another part too.
    """
    names = {part: [name for name, _ in rows] for part, rows in files.items()}
    for part, listed in names.items():
        missing = [name for name in listed if not located(root / name).is_file()]
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
