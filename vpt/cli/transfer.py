"""From which task to which prompts carry over."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from vpt.cli.app import Overrides, app, say
from vpt.cli.benchmarks import Engine


@app.command()
def transfer(
    suite: Annotated[str, typer.Argument(help="A path, or a name under configs/transfer.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="transfer/SUITE")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Processes of this machine, or Ray tasks (`ray start`).")
    ] = Engine.local,
    resume: Annotated[bool, typer.Option(help="Do what is not finished in the folder.")] = False,
) -> None:
    """Train each task from each other's prompts: vpt transfer halves tasks.NAME.root=IMAGES ...

    Each source → target pair at each number of shots, beside a start from
    scratch and the source that init_from=auto chooses. transfer.png is a heat
    map of the gains.
    """
    from vpt.bench.run_suite import ENGINES
    from vpt.bench.transfer import lines, transfer

    folder = out or Path("transfer") / Path(suite).stem
    do = partial(ENGINES[engine.value], cpus=1, gpus=1)
    for line in lines(transfer(suite, overrides or [], folder, do, resume=resume, log=say)):
        print(line)
