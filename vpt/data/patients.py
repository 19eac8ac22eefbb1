"""Whose image is whose: a table beside the data, and no patient in two parts."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpt.errors import InputError, some


def read_patients(path: Path) -> dict[str, str]:
    """Image → patient of a CSV with these two columns.

    Raises:
        InputError: it can't be read, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        return {row["image"]: row["patient"] for row in rows}
    except OSError as error:
        raise InputError(f"data.patients={path}: {error.strerror}: mend the path") from None
    except KeyError as error:
        raise InputError(f"data.patients={path}: no column {error}: give image,patient") from None


def patients_of(
    names: Sequence[str], found: Sequence[str | None], table: Mapping[str, str] | None
) -> list[str] | None:
    """The patient of each image: of the table, by path, file name or stem, else as `found`.

    None where nothing names any.

    Raises:
        InputError: some images have one, others none.
    """
    if table is not None:
        keys = ((name, Path(name).name, Path(name).stem) for name in names)
        found = [next((table[key] for key in each if key in table), None) for each in keys]
    missing = [name for name, patient in zip(names, found, strict=True) if not patient]
    if len(missing) == len(found) and table is None:
        return None
    if missing:
        raise InputError(
            f"{len(missing)} images have no patient, first {missing[0]}: name one for each"
        )
    return [str(patient) for patient in found]


def check_patients(parts: Mapping[str, Sequence[str] | None]) -> None:
    """Refuses a patient in two parts.

    Raises:
        InputError: there is one; names some.
    """
    for (one, a), (other, b) in itertools.combinations(parts.items(), 2):
        if shared := set(a or ()) & set(b or ()):
            raise InputError(
                f"{len(shared)} patients are in both {one} and {other}: {some(shared)}: move each "
                "to one part"
            )
