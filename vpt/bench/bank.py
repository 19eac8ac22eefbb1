"""The bank's part of `vpt bench serve`: one batch of many tasks against the bare backbone."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vpt import artifact, backbones, methods
from vpt.backbones.base import Backbone
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.serve.bank import PromptBank

CLASSES = 10
TOLERANCE = 1e-4  # of logits, relative to the largest


class Sizes(NamedTuple):
    """How much is measured."""

    tasks: tuple[int, ...]  # in the bank
    batch: int
    tower: dict[str, int]


SMALL = Sizes((1, 3), 4, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2})
FULL = Sizes((1, 16, 256, 1000), 64, {"patch_size": 32})  # ViT-B/32


def bench(out: Path, rounds: int, small: bool) -> None:
    """Write out/bank.json and show its table.

    Raises:
        InputError: the bank's logits are not those of each task's own model.
    """
    sizes = SMALL if small else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vit = VisionTransformer(num_classes=0, **sizes.tower).to(device)
    backbone = backbones.adapt(vit)
    with TemporaryDirectory() as folder:
        paths = _write_tasks(Path(folder), backbone, sizes.tasks[-1])
        bank, first, last = _fill(backbone, paths)
        rows = [_measure(bank, paths[:count], sizes.batch, rounds) for count in sizes.tasks]
    result = {
        "suite": "bank",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": rounds,
        "batch": sizes.batch,
        "bytes_a_task": bank.num_bytes / len(bank),
        "load_ms_of_first_ten": first,
        "load_ms_of_last_ten": last,
        "rows": rows,
    }
    write_atomically(out / "bank.json", json.dumps(result, indent=2).encode())
    table = Table(
        title=f"{sizes.batch} images, {result['device']}, {result['threads']} threads, "
        f"ms to load a task: {first:.0f} first, {last:.0f} last"
    )
    for column in (
        "tasks",
        "in a batch",
        "bare images/s",
        "bank / bare",
        "bank × per-task batches",
        "× swap",
        "batching",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        gains = (f"{row[key]:.2f}" for key in ("of_bare", "over_per_task", "over_swap", "batching"))
        table.add_row(str(row["tasks"]), str(row["distinct"]), f"{row['bare']:.3g}", *gains)
    Console().print(table)


def _write_tasks(folder: Path, backbone: Backbone, count: int) -> list[Path]:
    model = methods.attach(backbone, "vpt_deep", num_classes=CLASSES)
    paths = []
    for number in range(count):
        with torch.no_grad():
            for parameter in model.tunable_parameters().values():
                parameter.normal_(std=0.1)
        paths.append(artifact.save(model, folder / f"{number}.safetensors"))
    return paths


def _fill(backbone: Backbone, paths: list[Path]) -> tuple[PromptBank, float, float]:
    """A bank with all tasks loaded, and milliseconds that the first and the last ten took each."""
    bank, seconds = PromptBank(backbone), []
    for path in paths:
        bank.add(path.stem, path)
        seconds.append(_seconds(lambda name=path.stem: bank.load(name)))
    return bank, 1e3 * median(seconds[:10]), 1e3 * median(seconds[-10:])


@torch.no_grad()
def _measure(bank: PromptBank, paths: list[Path], batch: int, rounds: int) -> dict[str, Any]:
    """The row of one number of tasks: medians over interleaved rounds, each of tasks drawn anew.

    `batching` is what a batch of the bare backbone gains over single images.
    """
    backbone, count = bank.backbone, len(paths)
    size, channels = bank.preprocess.image_size, bank.preprocess.channels
    images = torch.randn(batch, channels, size, size, device=backbone.device)
    models = functools.cache(lambda name: artifact.load(paths[int(name)], backbone).fold())
    swapped = methods.attach(backbone, "vpt_deep", num_classes=CLASSES).eval()
    weights = {path.stem: safetensors.torch.load_file(path) for path in paths}

    def swap(name: str) -> methods.Method:
        swapped.load_state_dict(weights[name], strict=False)
        return swapped

    def forms(names: list[str]) -> dict[str, Callable[[], Tensor]]:
        return {
            "bare": lambda: backbone(images),
            "bank": lambda: torch.stack(bank(images, names)),
            "per_task": lambda: _by_task(names, images, models),
            "swap": lambda: _by_task(names, images, swap),
        }

    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        drawn = torch.randperm(count).repeat(-(-batch // count))[:batch].tolist()
        runs = forms([paths[number].stem for number in drawn])
        expected = runs["per_task"]()
        for form in ("bank", "swap"):
            error = ((runs[form]() - expected).abs().max() / expected.abs().max()).item()
            if not error <= TOLERANCE:
                raise InputError(f"{count} tasks, {form}: logits differ by {error:.0e}")
        runs["bare"]()
        for form, run in runs.items():
            seconds.setdefault(form, []).append(_seconds(run))
    took = {form: median(each) for form, each in seconds.items()}
    return {
        "tasks": count,
        "distinct": min(count, batch),
        **{form: batch / each for form, each in took.items()},  # images a second
        "of_bare": took["bare"] / took["bank"],
        "over_per_task": took["per_task"] / took["bank"],
        "over_swap": took["swap"] / took["bank"],
        "batching": batch * _single(backbone, images, rounds) / took["bare"],
    }


def _by_task(names: list[str], images: Tensor, model: Callable[[str], methods.Method]) -> Tensor:
    """Logits of images, those of a task together."""
    logits = images.new_empty(len(names), CLASSES)
    for name in dict.fromkeys(names):
        own = [place for place, other in enumerate(names) if other == name]
        logits[own] = model(name)(images[own])
    return logits


def _single(backbone: Backbone, images: Tensor, rounds: int) -> float:
    """Seconds of one image by itself, which say what batching alone gains on this machine."""
    return median(_seconds(lambda: backbone(images[:1])) for _ in range(rounds + 2))


def _seconds(run: Callable[[], object]) -> float:
    _wait()
    begin = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
