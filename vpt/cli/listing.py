"""List what is there."""

from typing import Annotated

import typer

from vpt.cli.app import app


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="methods|datasets|backbones|configs|suites")],
) -> None:
    """Show what is there: methods, datasets, backbones, configs or suites."""
    from vpt.catalog import catalog

    for name, description in catalog(what):
        print(f"{name:28} {description}")
