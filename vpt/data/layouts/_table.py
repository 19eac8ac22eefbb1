"""A table of images as text: its encoding, its separator, and what its columns are."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from vpt.data.layouts._files import part_of
from vpt.data.search import composed
from vpt.errors import InputError, some

# By role, the usual names of its column, first the one to prefer where there are several
_NAMES = {
    "path": (
        *("path", "filepath", "filename", "file", "fname", "imagepath", "imgpath", "imagefile"),
        *("imagefilename", "imagename", "imgname", "image", "img", "images", "imageid", "imgid"),
        *("imageindex", "isicid", "idcode", "picture", "photo", "id"),
    ),
    "label": (
        *("label", "labels", "class", "classname", "classlabel", "category", "categoryname"),
        *("target", "dx", "diagnosis", "species", "breed", "grade", "level"),
    ),
    "split": ("split", "part", "partition", "subset", "set", "usage", "phase", "fold"),
    "patient": (
        *("patient", "patientid", "subject", "subjectid", "participant", "participantid"),
        *("personid", "pid", "mrn", "ptid", "patid", "subj", "subjid", "donor", "donorid"),
        *("individual", "individualid", "animalid", "case", "caseid", "lesionid", "eyeid"),
        *("studyid", "studyinstanceuid", "slideid", "specimenid"),
    ),
}
# In the name of a column that would be one of these roles; of patients, not what describes them
_NEAR = {
    "split": re.compile(
        r"split|fold|partition|subset|train(or|and)?test|"
        r"^(is|in)?(train(ing)?|test(ing)?|val(id(ation)?)?|holdout)(set)?$"
    ),
    "patient": re.compile(
        r"(patient|subject|participant|lesion)(?!.*(age|sex|gender|weight|height|size|position|"
        r"orientation|race|ethnicity|type|location|site))"
    ),
}
_TYPOS = {"split": ("split",), "patient": ("patient", "patientid", "subject", "lesion")}


class Table(NamedTuple):
    """Lines of a table.

    Attributes:
        columns: role (path, label, split, patient): column.
        others: columns that have none of these roles.
        rows: number of the line and its values by column.
        encoding: of the text.
    """

    columns: Mapping[str, str]
    others: list[str]
    rows: list[tuple[int, dict[str, str]]]
    encoding: str


def read_table(path: Path) -> Table:
    """The table in a text file: commas, semicolons, tabs or bars; UTF-8, UTF-16 or Windows-1252.

    Raises:
        InputError: not such a file; a line with more fields than the header; two columns of one
            name; one that is nearly called as its role is, or holds parts but is not split.
    """
    text, encoding = _text(path)
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=header.count))
    try:
        names = [composed(name.strip()) for name in next(reader, [])]
        rows = list(_rows(path, reader, names))
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error}): save it as such") from None
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise InputError(f"{path}, line 1: column {some(twice)} twice: rename one")
    names = [name for name in names if name]  # pandas' index has no name
    columns = {role: found for role in _NAMES if (found := _column(path, role, names))}
    others = [name for name in names if name not in columns.values()]
    for role in _NEAR.keys() - columns:
        for name in others:
            near = _NEAR[role].search(_letters(name)) or _is_typo(_letters(name), _TYPOS[role])
            if near or (role == "split" and _holds_parts(row[name] for _, row in rows)):
                raise InputError(
                    f"{path}, line 1: column {name!r} looks like {role}, but is not called so: "
                    f"rename it {role}, or remove it"
                )
    return Table(columns, others, rows, encoding)


def _text(path: Path) -> tuple[str, str]:
    data = path.read_bytes()
    marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    for encoding in (marks.get(data[:2], "utf-8-sig"), "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, encoding
    raise InputError(f"{path}: not CSV in UTF-8, UTF-16 or Windows-1252: save it as such")


def _rows(
    path: Path, reader: Iterator[list[str]], names: list[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    for fields in reader:
        if not fields:
            continue
        if any(field.strip() for field in fields[len(names) :]):
            raise InputError(
                f"{path}, line {reader.line_num}: {len(fields)} fields, but the header has "
                f"{len(names)}: put fields with the separator in them in quotes"
            )
        fields += [""] * (len(names) - len(fields))
        yield reader.line_num, {n: f.strip() for n, f in zip(names, fields, strict=False) if n}


def _column(path: Path, role: str, names: list[str]) -> str | None:
    known = _NAMES[role]
    found = sorted(
        (name for name in names if _letters(name) in known),
        key=lambda name: known.index(_letters(name)),
    )
    if not found:
        return None
    if role in found:
        return role
    # which of several labels is meant can't be told, and of two spellings of one name neither
    if len(found) > 1 and (role == "label" or _letters(found[0]) == _letters(found[1])):
        raise InputError(
            f"{path}, line 1: {' and '.join(found)} could all be the {role}: rename one {role}"
        )
    return found[0]


def _holds_parts(values: Iterable[str]) -> bool:
    """True if all values name parts, of which there are several."""
    parts = {part_of(value) for value in set(values)}
    return len(parts) > 1 and None not in parts


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _is_typo(name: str, words: tuple[str, ...]) -> bool:
    """True if one letter is missing, added or wrong, or two neighbours are exchanged."""
    return any(
        name in _edits(word) or word in _edits(name) or _one_wrong(name, word) for word in words
    )


def _edits(word: str) -> set[str]:
    pairs = [(word[:i], word[i:]) for i in range(len(word))]
    return {a + b[1:] for a, b in pairs} | {a + b[1] + b[0] + b[2:] for a, b in pairs if b[1:]}


def _one_wrong(one: str, other: str) -> bool:
    return len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1
