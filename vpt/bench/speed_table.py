"""`vpt bench speed`: measures the engine, shows the table and writes it as JSON."""

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vpt import artifact
from vpt.bench.speed import measure, measure_run, works
from vpt.bench.speed_clip import clip_works
from vpt.files import write_atomically


def bench(out: Path, rounds: int, small: bool, run: bool) -> None:
    """Write out/speed.json and show its table; `run` adds a whole CoOp run, which takes minutes.

    Raises:
        InputError: the engine's outputs are not those of the token path.
    """
    todo = [*works(small), *clip_works(small)]
    rows = list(track(measure(todo, rounds), "measuring", total=len(todo)))
    if run:
        sizes = {"epochs": 2, "shots": 1, "classes": 6} if small else {}
        rows.append(measure_run(**sizes))
    cuda = torch.cuda.is_available()
    result = {
        "suite": "speed",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "version": artifact.package_version(),
        "rounds": rounds,
        "rows": rows,
    }
    write_atomically(out / "speed.json", json.dumps(result, indent=2).encode())
    title = f"{result['device']}, {result['threads']} threads, torch {torch.__version__}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("work")
    for column in ("engine", "tokens", "faster", "FLOPs", "/ bare", "saved", "matmul"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["work"]
    for form in ("engine", "tokens"):
        ms = row[f"{form}_ms"]
        yield f"{ms:.0f} ms" if ms < 1e5 else f"{ms / 1e3:.0f} s"
    yield f"{row['speedup']:.2f}×"
    yield f"{row['flop_ratio']:.2f}×" if "flop_ratio" in row else ""
    yield f"{row['engine_to_bare']:.2f}" if "engine_to_bare" in row else ""
    saved = row.get("tokens_saved_mb")
    yield f"{row['engine_saved_mb'] / saved:.2f}" if saved else ""
    yield f"{row['of_matmul_rate']:.0%}" if "of_matmul_rate" in row else ""
