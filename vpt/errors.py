"""The one exception that a user's mistake raises."""

import difflib
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set


class InputError(ValueError):
    """One line that names the culprit and the mend; the command line prints it and exits 1."""


def close(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, if any is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), None)


def nearest(word: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean 'x'?` with the known name closest to `word`, else the known names.

    `before` is put before the name, such as the section of a key.
    """
    known = sorted(known)
    name = close(word, known)
    return f"; did you mean {before + name!r}?" if name else f"; known: {', '.join(known)}"


def check_class_names(names: Sequence[str]) -> None:
    """Refuses class names that are not distinct texts in label order.

    Raises:
        InputError: a name twice, something else than a text, or names without an order.
    """
    if isinstance(names, str | Mapping | Set):
        kind = type(names).__name__
        raise InputError(f"class_names is a {kind}: give a list of names in label order")
    if not isinstance(names, Collection):
        raise InputError(f"class_names is a {type(names).__name__}: give a list in label order")
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"class name {name!r} is a {type(name).__name__}: give names as texts")
        if not name.strip():
            raise InputError(f"class name {name!r} is empty: give each class its own name")
    shown = (unicodedata.normalize("NFC", name.strip()) for name in names)
    twice = [name for name, number in Counter(shown).items() if number > 1]
    if twice:
        raise InputError(f"class names twice, {some(twice)}: give each class its own name")


def some(names: Collection[str]) -> str:
    """The first five names, sorted."""
    return ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
