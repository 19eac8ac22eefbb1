"""Artefacts with their cards, on the Hugging Face Hub or in a folder of the same form."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, metadata_load
from torch import nn

from vpt import artifact, backbones
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.hub.card import write_card

__all__ = ["pull", "push"]

PROMPT, CARD = RunFolder(Path()).prompt.name, "README.md"
Answer = TypeVar("Answer")


def push(
    path: str | Path, to: str | Path, *, licence: str | None = None, public: bool = False
) -> str:
    """Write an artefact and its prompt card to `to`; returns where they are.

    The card says what `result.json` of the run, if it lies beside the artefact, says of its test.
    Neither names a path of this machine: of weights in a local file only the backbone's name and
    fingerprint are told.

    Args:
        path: the artefact.
        to: OWNER/NAME on the Hub, unless there is such a folder; else a folder, made if missing, as
            `./OWNER/NAME`.
        licence: of the prompt, by the Hub's names, such as apache-2.0.
        public: show a repository that is made now to everybody.

    Raises:
        InputError: as `vpt.load`; the Hub is out of reach or refuses.
    """
    path = Path(path)
    tensors, metadata = artifact.read(path)
    if _is_local(metadata["backbone"]["checkpoint"]):
        metadata["backbone"]["checkpoint"] = None
    data = artifact.to_bytes(tensors, metadata)
    sha256 = hashlib.sha256(data).hexdigest()
    repository = _repository(to)
    name = repository.partition("/")[2] if repository else Path(to).resolve().name
    card = write_card(name, repository, metadata, RunFolder(path.parent), sha256, licence)
    files = {PROMPT: data, CARD: card.encode()}
    if repository is None:
        for name, content in files.items():
            write_atomically(Path(to) / name, content)
        return str(to)
    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi(library_name="vpt")
    _ask(repository, api.create_repo, repository, private=not public, exist_ok=True)
    message = f"Add a prompt of {metadata['method']}"
    return _ask(repository, api.create_commit, repository, added, commit_message=message).commit_url


def pull(
    source: str | Path,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    backbone: nn.Module | str | None = None,
) -> Path:
    """Fetch an artefact that `push` wrote, checked against its card; returns its file.

    Args:
        source: OWNER/NAME on the Hub, unless there is such a folder; else a folder.
        out: the file; None: NAME.safetensors here.
        revision: a branch, tag or commit of the Hub.
        backbone: refuse the artefact unless it was trained on this one: a model, or the checkpoint
            of its weights.

    Raises:
        InputError: nothing there; the file is not the one of the card; `out` holds another file;
            another backbone.
    """
    repository = _repository(source)
    prompt, card = (_fetch(source, repository, name, revision) for name in (PROMPT, CARD))
    data, named = prompt.read_bytes(), (metadata_load(card) or {}).get("vpt") or {}
    if hashlib.sha256(data).hexdigest() != named.get("sha256"):
        raise InputError(f"{source}: {PROMPT} is not the file of its card {CARD}: push it again")
    _, metadata = artifact.read(prompt)
    if metadata["backbone"]["fingerprint"] != named.get("fingerprint"):
        raise InputError(f"{source}: its card names another backbone than {PROMPT}: push it again")
    if backbone is not None:
        if isinstance(backbone, str):
            backbone = backbones.load(metadata["backbone"]["name"], backbone)
        artifact.check_weights(str(source), metadata, backbones.adapt(backbone))
    out = Path(out or f"{Path(repository or Path(source).resolve()).name}.safetensors")
    if out.exists() and out.read_bytes() != data:
        raise InputError(f"{out}: is another file already: give --out FILE")
    write_atomically(out, data)
    return out


def _repository(place: str | Path) -> str | None:
    """`place` if it is OWNER/NAME of the Hub, and no folder."""
    text = str(place)
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None
    return text if is_name and not Path(place).is_dir() else None


def _is_local(checkpoint: str | None) -> bool:
    return checkpoint is not None and (Path(checkpoint).is_absolute() or Path(checkpoint).exists())


def _fetch(source: str | Path, repository: str | None, name: str, revision: str | None) -> Path:
    """The file `name` of `source`, on this machine."""
    if repository is not None:
        return Path(_ask(repository, hf_hub_download, repository, name, revision=revision))
    path = Path(source) / name
    if not path.is_file():
        raise InputError(f"{path}: no such file: give a folder that vpt push wrote, or OWNER/NAME")
    return path


def _ask(repository: str, call: Callable[..., Answer], *args: Any, **options: Any) -> Answer:
    """Result of a call of the Hub.

    Raises:
        InputError: no network, no token, no such repository or file, or no right to it.
    """
    try:
        return call(*args, **options)
    except Exception as error:  # of whichever HTTP library it uses
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{repository} on the Hub: {lines[0].rstrip('.')}: check the name, the network and "
            f"`hf auth login`; a folder is ./{repository}"
        ) from None
