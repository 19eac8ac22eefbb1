"""`vpt bench`: runs a suite, shows its table and writes it as JSON."""

import json
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vpt import artifact
from vpt.engine.speed import measure, works
from vpt.errors import InputError, nearest

SUITES = ("speed",)


def bench(suite: str, out: Path, rounds: int, small: bool) -> None:
    """Run `suite` and write out/SUITE.json.

    Raises:
        InputError: no such suite, or the engine's outputs are not those of the token path.
    """
    if suite not in SUITES:
        raise InputError(f"no suite {suite!r}{nearest(suite, SUITES)}")
    todo = works(small)
    rows = list(track(measure(todo, rounds), "measuring", total=len(todo)))
    cuda = torch.cuda.is_available()
    result = {
        "suite": suite,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": artifact.package_version(),
        "rounds": rounds,
        "rows": rows,
    }
    artifact.write_atomically(out / f"{suite}.json", json.dumps(result, indent=2).encode())
    table = Table(
        title=f"{result['device']}, {result['threads']} threads, torch {torch.__version__}"
    )
    table.add_column("work")
    for column in (
        "engine ms",
        "tokens ms",
        "speed-up",
        "by FLOPs",
        "to bare",
        "saved",
        "of matmul",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        bare = f"{row['engine_to_bare']:.2f}" if "engine_to_bare" in row else ""
        saved = row["tokens_saved_mb"]
        table.add_row(
            row["work"],
            f"{row['engine_ms']:.1f}",
            f"{row['tokens_ms']:.1f}",
            f"{row['speedup']:.2f}×",
            f"{row['flop_ratio']:.2f}×",
            bare,
            f"{row['engine_saved_mb'] / saved:.2f}" if saved else "",
            f"{row['of_matmul_rate']:.0%}",
        )
    Console().print(table)
