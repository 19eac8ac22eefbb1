"""CoOp's `split_zhou_*.json` beside a folder of images."""

import json
from pathlib import Path

from vpt.data.cards import Card
from vpt.data.layouts import Read
from vpt.data.layouts._published import PARTS, parts_of, read_text
from vpt.errors import InputError

ROOT = "folder"


def recognise(root: Path) -> bool:
    """False: only a card says where the images of such a file lie."""
    return False


def read(root: Path, card: Card) -> Read:
    """The card's `split_file` below root, of images below the card's `images`.

    Raises:
        InputError: the file or an image of it is missing, or it is not such a file.
    """
    path = root / str(card.split_file)
    text = read_text(path, card)
    try:
        split = json.loads(text)
        rows = [
            (part, f"{card.images}/{file}", int(label), str(name))
            for part in PARTS
            for file, label, name in split[part]
        ]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{path}: not {{"train": [[path, label, class], …], "val": …, "test": …}}: {card.get}'
        ) from None
    class_names = dict(sorted({label: name for _, _, label, name in rows}.items()))
    if list(class_names) != list(range(len(class_names))):
        raise InputError(f"{path}: labels are not 0 to {len(class_names) - 1}: {card.get}")
    files = {part: [(file, label) for p, file, label, _ in rows if p == part] for part in PARTS}
    return list(class_names.values()), parts_of(root, files, card)
