"""The command's app, and what its commands share."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vpt.resources import package_version

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as data.shots=16.")
]
Artefact = Annotated[Path, typer.Argument(help="A prompt.safetensors that `vpt train` wrote.")]


class Engine(StrEnum):
    """Runs a suite, or a server: this machine's processes, or Ray."""

    local = "local"
    ray = "ray"


def _version(wanted: bool) -> None:
    if wanted:
        print(package_version())
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Learnable prompts for frozen vision transformers and CLIP."""


def first_process() -> bool:
    """False in all processes but the first of several, as torchrun and accelerate number them."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line for the user, beside a command's results."""
    if first_process():
        print(line, file=sys.stderr)
