"""Image files that annotations name."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from vpt.data.images import SUFFIXES
from vpt.data.layouts._files import part_of
from vpt.errors import InputError


class Images:
    """The image files below a folder, found by what annotations call them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                self._by_name[path.name].append(path)
                self._by_stem[path.stem].append(path)

    def find(self, name: str, where: Path) -> Path:
        """The file called `name`, a path or a stem, in the annotation file `where`.

        Raises:
            InputError: there is none, or there are several and none is nearer.
        """
        for folder in (where.parent, self.root):
            if (folder / name).is_file():
                return folder / name
        last = name.replace("\\", "/").rsplit("/", 1)[-1]
        found = self._by_name.get(last) or self._by_stem.get(last) or []
        part = split_part(where.relative_to(self.root).as_posix())
        near = [p for p in found if split_part(p.relative_to(self.root).as_posix()) == part]
        found = near if len(near) == 1 else found
        if len(found) != 1:
            kind = f"{len(found)} images" if found else "no image"
            raise InputError(f"{where}: {kind} below {self.root} called {name}: give one")
        return found[0]


def split_part(path: str) -> str | None:
    """The part that a path's folders or its file's words name, such as `instances_train2017`."""
    words = path.replace("-", "/").replace("_", "/").replace(".", "/").split("/")
    return next(filter(None, map(part_of, words)), None)


def read_text(path: Path) -> str:
    """The file's text.

    Raises:
        InputError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}): replace it") from None


def below(root: Path, pattern: str) -> Iterable[Path]:
    """Files below `root` that match, sorted, but for hidden ones."""
    files = sorted(root.rglob(pattern))
    return [p for p in files if not any(x.startswith(".") for x in p.relative_to(root).parts)]
