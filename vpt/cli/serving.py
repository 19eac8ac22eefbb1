"""Serve artefacts."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vpt.cli.app import Engine, app, say
from vpt.errors import InputError


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Its NAME.safetensors are the tasks.")],
    limits: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as queue=64.")
    ] = None,
    host: Annotated[str, typer.Option(help="Other than this machine needs --tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    tokens: Annotated[
        Path | None, typer.Option(help="YAML: token, tasks and admin of each tenant.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="This process, or replicas on a Ray cluster (`ray start`).")
    ] = Engine.local,
    replicas: Annotated[int, typer.Option(min=1, help="ray: how many.")] = 2,
) -> None:
    """Serve a folder of artefacts over HTTP, all on one backbone in memory.

    SIGHUP reads the folder again; SIGTERM answers what was accepted first.
    """
    extra = "serve" if engine == Engine.local else "serve-ray"
    try:
        if engine == Engine.local:
            from vpt.serve.server import serve
        else:
            from vpt.serve.cluster import serve as serve_replicas

            serve = partial(serve_replicas, replicas=replicas)
    except ModuleNotFoundError as error:
        raise InputError(
            f"vpt serve needs {error.name}: pip install 'visual-prompt-tuning[{extra}]'"
        ) from None

    serve(folder, host, port, tokens, checkpoint, limits or [], log=say)


@app.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Its NAME.safetensors are the tasks; without, tasks on drawings."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    checkpoint: Annotated[
        str | None, typer.Option(help="The backbone's weights, where they have moved.")
    ] = None,
) -> None:
    """Show prompts at work in a page on this machine, and train new ones there."""
    from vpt.page import demo

    demo(folder, port, checkpoint, log=say)
