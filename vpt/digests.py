"""Artefacts that a run starts from, and their digests, read without their tensors."""

from pathlib import Path

from safetensors import safe_open

from vpt.errors import InputError

AUTO = "auto:"


def sources(init_from: str) -> list[Path]:
    """The artefact that `init_from` names, or those of the folder of `auto:DIR`.

    Raises:
        InputError: as `artefacts`.
    """
    path = Path(init_from.removeprefix(AUTO)).expanduser()
    return artefacts(path) if init_from.startswith(AUTO) else [path]


def content(init_from: str) -> list[str]:
    """Content that `init_from` means, wherever its files lie.

    Raises:
        InputError: as `sources` and `stored_digest`.
    """
    chosen = [AUTO] if init_from.startswith(AUTO) else []
    return chosen + sorted(map(stored_digest, sources(init_from)))


def stored_digest(artefact: Path) -> str:
    """SHA-256 of an artefact's tensors and metadata, as its header says.

    Raises:
        InputError: no such file, or none that `vpt.save` wrote.
    """
    if not artefact.is_file():
        raise InputError(f"{artefact}: no such artefact")
    try:
        with safe_open(artefact, framework="np") as file:
            return (file.metadata() or {})["sha256"]
    except Exception:
        raise InputError(f"{artefact}: not an artefact of vpt: give a prompt.safetensors") from None


def artefacts(folder: Path) -> list[Path]:
    """The artefacts of a folder as `vpt serve` takes it or, without any, of its run folders.

    Raises:
        InputError: there are none.
    """
    hidden = {path for path in folder.glob(".*")}
    found = sorted({*folder.glob("*.safetensors")} - hidden)
    found = found or sorted(folder.glob("*/prompt.safetensors"))
    if not found:
        raise InputError(f"{folder}: no artefact in it: give a folder of NAME.safetensors, or runs")
    return found
