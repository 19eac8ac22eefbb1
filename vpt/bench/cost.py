"""`vpt bench cost`: prompts beside the probe, LoRA and full fine-tuning on the same data."""

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vpt import backbones
from vpt.bench import energy
from vpt.config import RunConfig, load_run
from vpt.files import write_atomically
from vpt.run import fit, prepare, test, write
from vpt.serve.bank import PromptBank

METHODS = ("linear_probe", "vpt_deep", "lora", "full_finetune")
DATA = ("data.name=digits", "backbone.name=tiny_clip")
TASKS = 16  # in memory, and in a batch
STORED = (1, 16, 256)  # tasks
NO_METER = "No energy: codecarbon (the extra `energy`) is missing, or finds no meter of CPU or GPU"


def bench(overrides: Sequence[str], out: Path, rounds: int) -> None:
    """Write out/cost.json and show its table; each method trains and serves in its own processes.

    Args:
        overrides: data and backbone as KEY=VALUE; none: the digits on the tiny CLIP.
        out: a folder.
        rounds: of the batches that are timed.

    Raises:
        InputError: as a run of these settings.
    """
    rows = []
    with TemporaryDirectory() as folder:
        for method in METHODS:
            keys = [*(overrides or DATA), f"out={folder}/{method}"]
            config = load_run(method, keys)
            rows.append(_alone(_train, config) | _alone(_serve, config, rounds))
            print(f"{method}: done", flush=True)
    result = {"suite": "cost", "tasks": TASKS, "threads": torch.get_num_threads(), "rows": rows}
    write_atomically(out / "cost.json", json.dumps(result, indent=2).encode())
    Console().print(_table(rows))


def _alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return value of `function` in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _train(config: RunConfig) -> dict[str, Any]:
    """The run's result, its artefact's size, and what training took: memory at its peak, and time.

    On a CPU it is processor time, which other work on the machine hardly changes.
    """
    prepared = prepare(config, log=lambda line: None)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = _memory_mb("VmRSS")
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def train() -> tuple[Any, float, float]:
        begin = clock()
        history = fit(prepared, log=lambda line: None, progress=False)
        return history, clock() - begin, _memory_mb("VmHWM") - before

    (history, seconds, peak), watt_hours = energy.estimate(train)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    result = write(prepared, history, test(prepared, log=lambda line: None))
    keys = ("method", "backbone", "data", "num_train", "accuracy", "accuracy_interval", "device")
    keys += ("tunable_parameters", "trained")
    return {
        **{key: result[key] for key in keys},
        "train_seconds": seconds,
        "train_wh": watt_hours,
        "peak_mb": peak,
        "stored_mb": prepared.folder.prompt.stat().st_size / 1e6,
    }


@torch.no_grad()
def _serve(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Memory of a task beside the backbone, loading one, and a batch in which all differ."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = backbones.load(config.backbone.name, config.backbone.checkpoint).to(device)
    bank = PromptBank(loaded)
    seconds = []
    for number in range(TASKS):
        bank.add(str(number), config.out / "prompt.safetensors")
        seconds.append(_seconds(lambda name=str(number): bank.load(name)))
    size, backbone = bank.preprocess.image_size, bank.backbone
    images = torch.randn(TASKS, bank.preprocess.channels, size, size, device=device)
    ratios = []
    for _ in range(rounds + 1):  # the first warms up
        bare = _seconds(lambda: backbone(images))
        ratios.append(bare / _seconds(lambda: bank(images, list(bank))))
    return {
        "memory_mb": bank.num_bytes / len(bank) / 1e6,
        "backbone_mb": sum(weight.nbytes for weight in backbone.parameters()) / 1e6,
        "load_ms": 1e3 * median(seconds),
        "of_bare": median(ratios[1:]),
    }


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _memory_mb(key: str) -> float:
    """Memory of this process: VmRSS now, VmHWM at its peak."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+)", text)[1]) / 1e3


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first['backbone']} ({first['backbone_mb']:.0f} MB), {first['data']}, "
        f"{first['num_train']} training images, {first['device']}",
        box=box.SIMPLE_HEAD,
        caption=None if first["train_wh"] else NO_METER,
    )
    table.add_column("")
    for row in rows:
        table.add_column(row["method"], justify="right", no_wrap=True)
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "test accuracy": lambda row: f"{row['accuracy']:.1%}",
        "tunable parameters": lambda row: f"{row['tunable_parameters']:,}",
        **{
            f"MB stored, {count} task{'s' * (count > 1)}": lambda row, count=count: _shown(
                count * row["stored_mb"]
            )
            for count in STORED
        },
        "seconds to train": lambda row: _shown(row["train_seconds"]),
        **{
            f"Wh of the {part.upper()} to train, estimated": lambda row, part=part: _shown(
                row["train_wh"][part]
            )
            for part in first["train_wh"]
        },
        "MB that training adds": lambda row: _shown(row["peak_mb"]),
        "MB served, a task": lambda row: _shown(row["memory_mb"]),
        "ms to load a task": lambda row: _shown(row["load_ms"]),
        f"throughput of {TASKS} tasks / bare": lambda row: f"{row['of_bare']:.2f}",
    }
    for line, show in lines.items():
        table.add_row(line, *map(show, rows))
    return table


def _shown(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:.0f}"
