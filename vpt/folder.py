"""The folder of a run: where it is, and which file is what."""

import os
from dataclasses import dataclass
from pathlib import Path

from vpt.config import RunConfig
from vpt.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON record an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def prompt(self) -> Path:
        """The artefact."""
        return self.path / "prompt.safetensors"

    @property
    def duplicates(self) -> Path:
        """One JSON record a test image that looks like a training image; there only if any does."""
        return self.path / "duplicates.jsonl"

    @property
    def failure(self) -> Path:
        """One line on why a suite could not do the run; there only if its last attempt failed."""
        return self.path / "failure.txt"

    @property
    def candidates(self) -> Path:
        """Findings on an auto run's candidates; there only while it is not finished."""
        return self.path / "candidates.json"

    @property
    def features(self) -> Path:
        """Image features for an auto run's candidates; there only while it is not finished."""
        return self.path / "features"

    @property
    def result(self) -> Path:
        """The metrics; there only when the run is finished."""
        return self.path / "result.json"

    def test(self, name: str) -> Path:
        """The metrics of one of `tests`; there only when it is done."""
        return self.path / "tests" / f"{name}.json"

    @property
    def checkpoint(self) -> Path:
        """State to resume from; there only while the run is not finished."""
        return self.path / "checkpoint.pt"

    @property
    def confusion(self) -> Path:
        """The confusion matrix on the test images."""
        return self.path / "confusion.png"


def default_folder(config: RunConfig) -> Path:
    """runs/METHOD-DATA[-HALF]-SHOTSshot-seedSEED."""
    root = config.data.root
    data = "+".join(config.tasks) or config.data.name or (root.stem if root else "data")
    data += f"-{config.data.class_half}" if config.data.class_half else ""
    shots = "all" if config.data.shots is None else f"{config.data.shots}shot"
    return Path("runs") / f"{config.method.name}-{data}-{shots}-seed{config.data.seed}"


def check_cache(folder: Path | None) -> None:
    """Refuses an `engine.feature_cache` that is not there and cannot be made.

    One that is there may be whole already, so that nothing is written into it.

    Raises:
        InputError: says which folder it is.
    """
    if folder is None:
        return
    folder = folder.expanduser().absolute()
    there = next(path for path in [folder, *folder.parents] if os.path.lexists(path))
    if not os.path.isdir(there) or (there != folder and not os.access(there, os.W_OK)):
        raise InputError(f"engine.feature_cache={folder}: cannot be made: give another folder")
