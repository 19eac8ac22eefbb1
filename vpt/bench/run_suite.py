"""`vpt bench SUITE`: runs a suite, with a line for each run and a table of those that failed."""

import json
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vpt.bench.cluster import run_on_ray
from vpt.bench.local import run_locally
from vpt.bench.suite import cells, run_cells
from vpt.config import RunConfig, load_suite, to_yaml
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder

ENGINES = {"local": run_locally, "ray": run_on_ray}


def run_suite(
    name: str,
    overrides: Sequence[str],
    out: Path,
    *,
    engine: str = "local",
    resume: bool = False,
    cpus: int = 1,
    gpus: float = 1,
) -> int:
    """Run the suite `name` into `out`; the number of runs that could not be done.

    Everything that the suite itself says is checked before the first run.

    Raises:
        InputError: a bad suite, or `out` holds one and not `resume`.
    """
    suite = load_suite(name, overrides)
    todo = cells(suite, out)
    description = out / "suite.yaml"
    if description.is_file() and not resume:
        raise InputError(f"{out}: holds a suite: give --resume, or another --out")
    write_atomically(description, to_yaml(suite).encode())
    outcomes = run_cells(todo, partial(ENGINES[engine], cpus=cpus, gpus=gpus))
    total = sum(len(cell.candidates) + len(cell.seeds) for cell in todo)
    failures = {}
    with closing(outcomes), Progress(console=Console()) as bar:  # Ctrl-C ends the processes too
        for config, failure in bar.track(outcomes, total, description=Path(name).stem):
            bar.console.print(_line(config, failure), soft_wrap=True, highlight=False, markup=False)
            if failure and config.data.split == suite.split:  # a grid may hold what fails
                failures[config.out.name] = failure
                write_atomically(RunFolder(config.out).failure, failure.encode())
    console = Console()
    if failures:
        console.print(_table(failures))
    console.print(f"{total} runs in {out}", highlight=False)
    return len(failures)


def _line(config: RunConfig, failure: str | None) -> str:
    if failure:
        return f"{config.out.name}: {failure}"
    result = json.loads(RunFolder(config.out).result.read_text())
    return f"{config.out.name}: {result['accuracy']:.1%} {result.get('notice', '')}".rstrip()


def _table(failures: dict[str, str]) -> Table:
    table = Table(title=f"{len(failures)} runs failed")
    table.add_column("run")
    table.add_column("why")
    for name, reason in failures.items():
        table.add_row(name, Text(reason))
    return table
