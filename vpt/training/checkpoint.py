"""The one file that an interrupted training goes on from."""

import io
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vpt.errors import InputError
from vpt.files import write_atomically


class Trained(Protocol):
    """A model whose training can be interrupted."""

    def training_tensors(self) -> dict[str, Tensor]:
        """All that training changes."""

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool) -> Any:
        """Take it back."""


def read_checkpoint(
    path: Path | None, model: Trained, optimizer: torch.optim.Optimizer
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Load what `write_checkpoint` wrote, where it is there; the records so far, and what else.

    Raises:
        InputError: a file that is broken, or of another model.
    """
    if path is None or not path.is_file():
        return [], {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: cannot be continued from ({reason}): delete it to start again"
        ) from None
    return state["history"], state.get("kept", {})


def write_checkpoint(
    path: Path,
    model: Trained,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    **kept: Any,
) -> None:
    """Write tensors, the optimizer's state, the records so far and what is `kept`, atomically."""
    buffer = io.BytesIO()
    state = {"model": model.training_tensors(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "history": history, "kept": kept}, buffer)
    write_atomically(path, buffer.getvalue())
