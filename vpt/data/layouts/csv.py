"""A CSV file of lines `path,label[,split][,patient]`."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from vpt.data.cards import Card
from vpt.data.images import samples_of
from vpt.data.layouts import Read
from vpt.data.layouts._files import PARTS, train_and_test
from vpt.errors import InputError

ROOT = ".csv"


def recognise(root: Path) -> bool:
    """True for a .csv file."""
    return root.is_file() and root.suffix.lower() == ROOT


def read(root: Path, card: Card) -> Read:
    """Lines `path,label[,split][,patient]`, paths from the file's folder.

    Raises:
        InputError: a line that is none of these, a missing image, no line for training.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    lines: dict[str, int] = {}
    for line, row in _rows(root):
        where = f"{root}, line {line}"
        for column in ("path", "label", "patient"):
            if row.get(column) == "":
                raise InputError(f"{where}: {column} is empty: fill it or remove the line")
        part = row.get("split", "train")
        if part not in PARTS:
            raise InputError(f"{where}: split={part!r}: write train, val or test")
        if not (root.parent / row["path"]).is_file():
            raise InputError(f"{where}: {row['path']}: no such file: mend the path")
        row["path"] = Path(os.path.relpath(root.parent / row["path"], root.parent)).as_posix()
        if lines.setdefault(row["path"], line) != line:
            raise InputError(
                f"{where}: {row['path']} is already in line {lines[row['path']]}: remove one"
            )
        rows.setdefault(PARTS[part], []).append(row)
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
    return class_names, train_and_test(parts)


def _rows(root: Path) -> Iterator[tuple[int, dict[str, str]]]:
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
