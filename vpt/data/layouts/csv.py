"""A table with a line an image: its path, its label and, if there are, its part and patient."""

import os
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpt.data.cards import Card
from vpt.data.images import Samples
from vpt.data.layouts import Read
from vpt.data.layouts._files import part_of, train_and_test
from vpt.data.layouts._table import Table, read_table
from vpt.data.search import composed, matches, search
from vpt.errors import InputError, some

ROOT = ".csv"
_BINARY = {"0": "0", "1": "1", "0.0": "0", "1.0": "1"}


class Line(NamedTuple):
    """An image, its label (of columns of 0 and 1, their digits), and its patient if known."""

    name: str
    path: Path
    label: str
    patient: str | None


def recognise(root: Path) -> bool:
    """True for a .csv or .tsv file."""
    return root.is_file() and root.suffix.lower() in {ROOT, ".tsv"}


def read(root: Path, card: Card) -> Read:
    """Lines of a path, from the file's folder, and a label or a 0 or 1 for each class.

    Raises:
        InputError: as `read_tables`.
    """
    return read_tables({root: None}, root.parent, card)


def read_tables(tables: Mapping[Path, str | None], root: Path, card: Card) -> Read:
    """Tables, each with its part (None: as its own column says), as one data set below `root`.

    Raises:
        InputError: as `read_table`; a line with an empty field, a missing image or an unknown
            part; no line for training.
    """
    parts: dict[str, list[Line]] = {}
    left_out, notes, seen = {}, {}, {}
    roles, one_hot = None, []
    for path, given in tables.items():
        table = read_table(path)
        if roles is None:
            roles, one_hot = table.columns.keys(), _one_hot(path, table)
        elif roles != table.columns.keys():
            raise InputError(f"{path}: other columns than {next(iter(tables))}: give both the same")
        notes |= dict.fromkeys(_describe(table, one_hot))
        files = _Files(path.parent)
        for number, row in table.rows:
            where = f"{path}, line {number}"
            values = {role: row[column] for role, column in table.columns.items()}
            for role in ("path", "label", "patient"):
                if values.get(role) == "":
                    raise InputError(f"{where}: {role} is empty: fill it or remove the line")
            if pattern := _excluding(values["path"], card):
                left_out[values["path"]] = f"excluded by {pattern}"
                continue
            part = given or _part(where, values.get("split", "train"))
            file = files.find(where, values["path"])
            name = composed(Path(os.path.relpath(file, root)).as_posix())
            if seen.setdefault(name, where) != where:
                first = seen[name].removeprefix(f"{path}, ")
                raise InputError(f"{where}: {name} is already in {first}: remove one")
            label = "".join(_digit(where, row, column) for column in one_hot)
            label = label or composed(values["label"])
            line = Line(name, file, label, values.get("patient"))
            parts.setdefault(part, []).append(line)
    if "train" not in parts:
        raise InputError(
            f"{next(iter(tables))}: no line for training: add path,label lines (split: train)"
        )
    if roles is not None and "split" not in roles and len(parts) == 1:
        parts, said = _by_folder(parts["train"])
        notes |= dict.fromkeys(said)
    class_names, label_of, said = _classes([line for p in parts.values() for line in p], one_hot)
    samples = {part: _samples(lines, label_of) for part, lines in parts.items()}
    return Read(class_names, train_and_test(samples), left_out, [*notes, *said])


def _samples(lines: list[Line], label_of: Callable[[str], int | list[int]]) -> Samples:
    labels = np.array([label_of(line.label) for line in lines])
    return Samples(
        [line.path for line in lines],
        labels.astype(np.float32 if labels.ndim == 2 else np.int64),
        [line.name for line in lines],
        None if lines[0].patient is None else [str(line.patient) for line in lines],
    )


def _classes(
    lines: list[Line], one_hot: list[str]
) -> tuple[list[str], Callable[[str], int | list[int]], list[str]]:
    """Class names, what gives a label by its text, and lines on the classes."""
    labels = {line.label for line in lines}
    if not one_hot:
        numbers = all(label.isdecimal() for label in labels)
        names = sorted(labels, key=int if numbers else str)
        return names, {name: index for index, name in enumerate(names)}.__getitem__, []
    used = [i for i in range(len(one_hot)) if any(label[i] == "1" for label in labels)]
    unused = [one_hot[i] for i in range(len(one_hot)) if i not in used]
    said = [f"left out classes without an image: {', '.join(unused)}"] if unused else []
    names = [one_hot[i] for i in used]
    if all(label.count("1") == 1 for label in labels):
        return names, lambda label: used.index(label.index("1")), said
    return names, lambda label: [int(label[i]) for i in used], said


def _one_hot(path: Path, table: Table) -> list[str]:
    """Columns of 0 and 1, one a class, of a table without a column of labels.

    Raises:
        InputError: there is no column of paths, or none of labels and no two of 0 and 1.
    """
    header = ",".join([*table.columns.values(), *table.others])
    known = "the header is path,label[,split][,patient]"
    if "path" not in table.columns:
        raise InputError(f"{path}, line 1: no column 'path' in {header!r}: {known}")
    if "label" in table.columns:
        return []
    rows = [row for _, row in table.rows]
    binary = [name for name in table.others if rows and all(row[name] in _BINARY for row in rows)]
    if len(binary) < 2:
        raise InputError(
            f"{path}, line 1: no column 'label' in {header!r}: {known}, or has columns of 0 and 1"
        )
    return binary


def _digit(where: str, row: Mapping[str, str], column: str) -> str:
    if row.get(column) not in _BINARY:
        raise InputError(f"{where}: {column}={row.get(column)!r}: write 0 or 1")
    return _BINARY[row[column]]


def _describe(table: Table, one_hot: list[str]) -> list[str]:
    """Lines on what columns were taken for, where they are not called so, and on the others."""
    renamed = {role: column for role, column in table.columns.items() if role != column}
    lines = [f"{role} is column {column!r}" for role, column in renamed.items()]
    if one_hot:
        lines.append(f"classes are columns {', '.join(one_hot)}")
    if ignored := [name for name in table.others if name not in one_hot]:
        lines.append(f"columns that are not read: {', '.join(ignored)}")
    if table.encoding == "cp1252":
        lines.append("the table is not UTF-8, and was read as Windows-1252")
    return lines


def _excluding(name: str, card: Card) -> str | None:
    """The pattern that leaves an image out."""
    if any(matches(name, pattern) for pattern in card.include):
        return None
    return next((pattern for pattern in card.exclude if matches(name, pattern)), None)


def _part(where: str, value: str) -> str:
    part = part_of(value)
    if part is None:
        raise InputError(f"{where}: split={value!r}: write train, val or test")
    return part


def _by_folder(lines: list[Line]) -> tuple[dict[str, list[Line]], list[str]]:
    """Parts by the first folder of the paths, where that names one of every image."""
    parts: dict[str, list[Line]] = {}
    for line in lines:
        folder, slash, _ = line.name.partition("/")
        parts.setdefault((slash and part_of(folder)) or "", []).append(line)
    if "" in parts or "train" not in parts or len(parts) == 1:
        return {"train": lines}, []
    return parts, [f"parts are the folders of the paths: {', '.join(parts)}"]


class _Files:
    """Image files below a table's folder, by path, name or either without suffix."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, where: str, text: str) -> Path:
        """The file that a line's path means.

        Raises:
            InputError: none, or more than one.
        """
        text = text.replace("\\", "/") if not (self.folder / text).is_file() else text
        if (self.folder / text).is_file():
            return self.folder / text
        found = next(filter(None, map(self._named, _tails(text))), [])
        if not found:
            raise InputError(f"{where}: {text}: no such file: mend the path")
        if len(found) > 1:
            raise InputError(
                f"{where}: {text} may be each of {some([str(path) for path in found])}: write the "
                "path from the table's folder"
            )
        return found[0]

    def _named(self, text: str) -> list[Path]:
        return self._by_name.get(composed(Path(text).as_posix()), [])

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = {}
        for name, path in search(self.folder).images.items():
            file = name.rpartition("/")[2]
            for key in {name, name.rpartition(".")[0], file, file.rpartition(".")[0]}:
                index.setdefault(key, []).append(path)
        return index


def _tails(text: str) -> list[str]:
    """The path itself; of another machine's (absolute) also what is below each of its folders.

    The name alone is none, for an image of another folder may have it too.
    """
    parts = text.split("/")
    absolute = text.startswith("/") or re.match("[a-zA-Z]:/", text)
    return [text, *("/".join(parts[i:]) for i in range(1, len(parts) - 1) if absolute)]
