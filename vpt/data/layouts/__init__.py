"""One file a layout of data, found by its file name; a folder put on `__path__` adds one's own."""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vpt.data.images import Samples
from vpt.errors import InputError

if TYPE_CHECKING:
    from vpt.data.cards import Card


class Read(NamedTuple):
    """Result of a layout's `read`; one of one's own may give a plain tuple of the first two.

    Attributes:
        class_names: in label order.
        parts: train, test (and val), or all.
        left_out: path of what was left out: its kind, in the plural.
        notes: lines on how the files were understood.
    """

    class_names: list[str]
    parts: dict[str, Samples]
    left_out: Mapping[str, str] = {}
    notes: Sequence[str] = ()


class Layout(Protocol):
    """A module of this package: how the files of a data set lie below its root."""

    ROOT: str | None  # "folder", or the suffix of a file, such as ".csv"; None: reads no files

    def recognise(self, root: Path) -> bool:
        """True if `root`, which exists, plainly has this layout, and no card is needed to read it.

        Any folder may be one of class folders: `folder` counts only if no other layout does.
        """

    def read(self, root: Path, card: "Card") -> Read:
        """Class names, and samples of the parts.

        Raises:
            InputError: files that do not have this layout.
        """


def names() -> list[str]:
    """Names of the layouts, sorted: the modules of this package."""
    modules = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if not name.startswith("_"))


def find(name: str) -> Layout:
    """The layout called `name`, one of `names()`."""
    return importlib.import_module(f"{__name__}.{name}")


def recognise(root: Path) -> str:
    """Name of the layout that `root` plainly has.

    Raises:
        InputError: none, or more than one.
    """
    layouts = {name: find(name) for name in names()}
    found = [name for name, layout in layouts.items() if layout.recognise(root)]
    found = [name for name in found if name != "folder"] or found
    if len(found) > 1:
        raise InputError(
            f"data.root={root}: has the layouts {' and '.join(found)}: give data.name=NAME, one of "
            "them"
        )
    if not found:
        kinds = {layout.ROOT for layout in layouts.values()} - {"folder", None}
        raise InputError(
            f"data.root={root}: not a folder, {' or '.join(sorted(kinds))}: unpack it if it is an "
            "archive"
        )
    return found[0]
