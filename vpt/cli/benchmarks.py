"""Suites, benchmarks and reports."""

from pathlib import Path
from typing import Annotated

import typer

from vpt.cli.app import Engine, Overrides, app, say
from vpt.errors import InputError


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(help="A path, a name of `vpt list suites`, speed, serve, cost, recipe.")
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="bench/SUITE")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Processes of this machine, or Ray tasks (`ray start`).")
    ] = Engine.local,
    resume: Annotated[bool, typer.Option(help="Do what is not finished in the folder.")] = False,
    cpus_per_run: Annotated[int, typer.Option(min=1, help="Cores for a run without a GPU.")] = 1,
    gpus_per_run: Annotated[float, typer.Option(min=0.01, max=1, help="Fraction of a GPU.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="speed, serve, cost: repetitions.")] = 5,
    small: Annotated[bool, typer.Option(help="speed, serve: tiny towers, to try it.")] = False,
    run: Annotated[bool, typer.Option(help="speed: also a whole CoOp run, minutes.")] = False,
    shots: Annotated[
        list[int] | None,
        typer.Option(min=1, help="recipe: images a class; repeat it.", show_default="5, 16"),
    ] = None,
) -> None:
    """Run data sets × methods × shots × seeds: vpt bench fgvc root=DIR.

    With `speed`, time the engine against prompts as tokens instead; with
    `serve`, a mixed batch of many tasks and a server under load, and fail
    where one of their bounds is broken; with `cost`, what prompts save
    beside LoRA, full fine-tuning and the probe; with `recipe`, `vpt train vpt_deep` with
    these keys, in forward passes of its training images: vpt bench recipe
    data.root=IMAGES --shots 5.
    """
    folder = out or Path("bench")
    if overrides and suite in ("speed", "serve"):
        raise InputError(f"{overrides[0]}: {suite} takes no KEY=VALUE: drop it")
    match suite:
        case "recipe":
            from vpt.bench import recipe

            recipe.bench(overrides or [], shots or [5, 16])
        case "cost":
            from vpt.bench import cost

            cost.bench(overrides or [], folder, rounds)
        case "speed":
            from vpt.bench import speed_table

            speed_table.bench(folder, rounds, small, run)
        case "serve":
            from vpt.bench import bank, serving

            broken = bank.bench(folder, rounds, small) + serving.bench(folder, small)
            if broken:
                raise InputError("; ".join(broken))
        case _:
            from vpt.bench.run_suite import run_suite

            failed = run_suite(
                suite,
                overrides or [],
                out or folder / Path(suite).stem,
                engine=engine.value,
                resume=resume,
                cpus=cpus_per_run,
                gpus=gpus_per_run,
            )
            if failed:
                raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Holds run folders, at any depth.")],
    out: Annotated[Path | None, typer.Option(help="Instead of FOLDER/report.")] = None,
) -> None:
    """Compare runs: mean ± std over seeds, plots, one HTML page, CSV and LaTeX."""
    from vpt.report import report

    print(report(folder, out or folder / "report", log=say))
