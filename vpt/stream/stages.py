"""A stage on disk: a run folder a task, which later stages check and never touch."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from vpt import artifact
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.methods import Method


@dataclass(frozen=True)
class Stage:
    """The files of stage `number`, counted from 0, below `root`."""

    root: Path
    number: int

    @property
    def folder(self) -> RunFolder:
        """Files as of any run; its result.json is of all classes so far."""
        return RunFolder(self.root / f"task{self.number + 1:02d}")

    @property
    def statistics(self) -> Path:
        """Tensors for later tasks that the artefact lacks; there only if there are any."""
        return self.folder.path / "statistics.safetensors"

    @property
    def record(self) -> Path:
        """Accuracies and costs, and hashes of the stage's files; written last."""
        return self.folder.path / "stage.json"

    def read(self) -> dict[str, Any] | None:
        """The record, None where the stage is not finished.

        Raises:
            InputError: a file is not as the stage left it.
        """
        if not self.record.is_file():
            return None
        try:
            record = json.loads(self.record.read_text())
        except ValueError:
            raise InputError(
                f"{self.record}: not JSON: restore it, or delete {self.folder.path} and what is "
                "after it"
            ) from None
        for name, digest in record["sha256"].items():
            path = self.folder.path / name
            if not path.is_file() or _digest(path) != digest:
                raise InputError(
                    f"{path}: changed since its stage was finished: restore it, or give another "
                    "out=DIR"
                )
        return record

    def write(self, record: dict[str, Any]) -> None:
        """Finish the stage: hashes of its files, of the stage's before among them."""
        files = [self.folder.prompt, self.folder.result, self.statistics]
        hashes = {path.name: _digest(path) for path in files if path.is_file()}
        if self.number:
            before = Stage(self.root, self.number - 1).record
            hashes[f"../{before.parent.name}/{before.name}"] = _digest(before)
        write_atomically(self.record, json.dumps({**record, "sha256": hashes}, indent=2).encode())

    def write_statistics(self, model: Method) -> None:
        """Store what the artefact lacks."""
        own = model.artifact_tensors()
        tensors = {name: t for name, t in model.training_tensors().items() if name not in own}
        if tensors:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_atomically(self.statistics, safetensors.torch.save(tensors))

    def restore(self, model: Method) -> None:
        """Make `model` what this stage left."""
        tensors, _ = artifact.read(self.folder.prompt)
        if self.statistics.is_file():
            tensors |= safetensors.torch.load_file(self.statistics)
        model.make_room(tensors)
        model.load_state_dict(tensors, strict=False)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
