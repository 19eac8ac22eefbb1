"""The one exception that a user's mistake raises."""

import difflib
from collections.abc import Collection, Iterable


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


def some(names: Collection[str]) -> str:
    """The first five names, sorted."""
    return ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
