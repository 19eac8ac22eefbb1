"""VPT's `train.json`, `val.json` and `test.json` (path: class number), or class folders."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vpt.data.cards import Card
from vpt.data.layouts import Read, folder
from vpt.data.layouts._published import PARTS, parts_of, read_text
from vpt.errors import InputError

ROOT = "folder"
_JSON = TypeAdapter(dict[str, int])


def recognise(root: Path) -> bool:
    """False: only a card says where the images of such files lie."""
    return False


def read(root: Path, card: Card) -> Read:
    """The three files, of images below the card's `images`; or `folder`'s parts in their place.

    Raises:
        InputError: a file or an image of it is missing, or it is not such a file.
    """
    if not (root / "train.json").is_file():
        if not (root / "train").is_dir():
            raise InputError(f"{root}: neither train.json nor train/: {card.get}")
        return folder.read(root, card)
    numbers = {part: _numbers(root / f"{part}.json", card) for part in PARTS}
    # Class numbers need not count from 0, and may have gaps.
    known = sorted({number for part in numbers.values() for number in part.values()})
    label = {number: index for index, number in enumerate(known)}
    files = {
        part: [((Path(card.images or "") / file).as_posix(), label[n]) for file, n in rows.items()]
        for part, rows in numbers.items()
    }
    return [str(number) for number in known], parts_of(root, files, card)


def _numbers(path: Path, card: Card) -> dict[str, int]:
    try:
        return _JSON.validate_json(read_text(path, card))
    except ValidationError:
        raise InputError(f'{path}: not {{"path": class number, …}}: {card.get}') from None
