"""Send artefacts to others, and fetch theirs."""

from pathlib import Path
from typing import Annotated

import typer

from vpt.cli.app import Artefact, app


@app.command()
def push(
    artefact: Artefact,
    to: Annotated[str, typer.Argument(metavar="REPO|FOLDER", help="OWNER/NAME on the Hub.")],
    licence: Annotated[
        str | None, typer.Option(help="Of the prompt, as the Hub names it: apache-2.0.")
    ] = None,
    public: Annotated[bool, typer.Option(help="Show a new repository to everybody.")] = False,
) -> None:
    """Share an artefact with a card that says what it is, and how good it was."""
    from vpt.hub import push

    print(f"wrote {push(artefact, to, licence=licence, public=public)}")


@app.command()
def pull(
    source: Annotated[str, typer.Argument(metavar="REPO|FOLDER", help="OWNER/NAME on the Hub.")],
    out: Annotated[
        Path | None, typer.Option(help="The file.", show_default="NAME.safetensors")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights that it has to belong to, else it is refused.")
    ] = None,
) -> None:
    """Fetch an artefact that `vpt push` wrote, checked against its card."""
    from vpt.hub import pull

    print(f"wrote {pull(source, out, revision=revision, backbone=checkpoint)}")
