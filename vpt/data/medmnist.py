"""MedMNIST's own file names, and where its package downloads to."""

import re
from pathlib import Path

from vpt import resources
from vpt.data.cards import load_card


def card_name(file: Path) -> str | None:
    """Name of the card of `file`, such as breastmnist.npz or breastmnist_224.npz, if it has one."""
    stem = re.sub(r"_\d+$", "", file.stem)
    if file.is_file() and file.suffix.lower() == ".npz" and stem in resources.names("datasets"):
        return stem if load_card(stem).layout == "npz" else None
    return None


def downloaded(name: str) -> Path | None:
    """The largest of the sizes that the medmnist package has downloaded, if any."""
    files = Path("~/.medmnist").expanduser().glob(f"{name}*.npz")
    return max(files, key=lambda file: file.stat().st_size, default=None)
