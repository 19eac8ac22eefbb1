"""The tasks of a folder: each artefact file is one, called by the file's name."""

from pathlib import Path
from typing import Any

from safetensors import safe_open

from vpt.dense.artefact import Model, kind_of, load
from vpt.errors import InputError
from vpt.serve.bank import PromptBank


class Tasks:
    """A folder's artefacts in a bank, read again by `reload`.

    Attributes:
        versions: task → the first digits of its artefact's digest.
        dense: those tasks that find boxes or masks, which run by themselves.
    """

    def __init__(self, folder: Path, bank: PromptBank) -> None:
        self.folder, self.bank = folder, bank
        self.versions: dict[str, str] = {}
        self.dense: dict[str, Model] = {}
        self._states: dict[str, tuple[int, ...]] = {}

    def reload(self) -> dict[str, Any]:
        """Names `added`, `replaced` and `removed`, and `refused` with why.

        One that is refused stays as it was. Names come from the folder's own list, so no request
        names a file. Call it between two batches.
        """
        done: dict[str, Any] = {"added": [], "replaced": [], "removed": [], "refused": {}}
        files = {
            path.stem: path
            for path in sorted(self.folder.glob("*.safetensors"))
            if not path.name.startswith(".")
        }
        for name in sorted(self.versions.keys() - files.keys()):
            self._remove(name)
            del self.versions[name], self._states[name]
            done["removed"].append(name)
        for name, path in files.items():
            try:
                change = self.refresh(name, path)
            except InputError as error:
                done["refused"][name] = str(error)
            else:
                if change:
                    done[change].append(name)
        return done

    def refresh(self, name: str, path: Path | None = None) -> str | None:
        """Take the artefact of one task again; `added`, `replaced`, or None if it is the same.

        Raises:
            InputError: it can't be read, or is not for the bank.
        """
        path = path or self.folder / f"{name}.safetensors"
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}: copy it again") from None
        state = status.st_mtime_ns, status.st_size, status.st_ino
        if self._states.get(name) == state:
            return None
        version, known = _version(path), name in self.versions
        if kind_of(path):
            model = load(path, self.bank.backbone).fold()
            if known:
                self._remove(name)
            self.dense[name] = model
        elif name in self.dense:
            self.bank.add(name, path)
            del self.dense[name]
        else:
            (self.bank.replace if known else self.bank.add)(name, path)
        # the version last: who reads it before the task never takes an old task for the new one
        self.versions[name], self._states[name] = version, state
        return "replaced" if known else "added"

    def _remove(self, name: str) -> None:
        if self.dense.pop(name, None) is None:
            self.bank.remove(name)


def _version(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("sha256", "")[:12]
    except Exception as error:
        raise InputError(f"{path}: not a safetensors file ({error}): copy it again") from None
