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
LEAST = 0.9  # of the bare backbone's throughput, which every number of tasks has to keep


class Sizes(NamedTuple):
    """How much is measured."""

    tasks: tuple[int, ...]  # in the bank
    batch: int
    tower: dict[str, int]


SMALL = Sizes((1, 3), 4, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2})
FULL = Sizes((1, 16, 256, 1000), 64, {"patch_size": 32})  # ViT-B/32


def bench(out: Path, rounds: int, small: bool) -> list[str]:
    """Bounds that are broken, a line each; writes out/bank.json and shows its table.

    One CPU thread is timed by its processor time, which other work on the machine hardly changes.

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
    return [
        f"bank, {row['tasks']} tasks: {row['of_bare']:.2f} of the bare throughput, below {LEAST}"
        for row in rows
        if row["of_bare"] < LEAST and not small
    ]


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
        begin = time.perf_counter()
        bank.load(path.stem)
        seconds.append(time.perf_counter() - begin)
    return bank, 1e3 * median(seconds[:10]), 1e3 * median(seconds[-10:])


@torch.no_grad()
def _measure(bank: PromptBank, paths: list[Path], batch: int, rounds: int) -> dict[str, Any]:
    """The row of one number of tasks: medians over interleaved rounds, each of tasks drawn anew.

    Ratios are medians of the rounds' own. `batching` is what a batch of the bare backbone gains
    over single images.
    """
    backbone, names = bank.backbone, [path.stem for path in paths]
    size, channels = bank.preprocess.image_size, bank.preprocess.channels
    images = torch.randn(batch, channels, size, size, device=backbone.device)
    models = functools.cache(lambda name: artifact.load(paths[int(name)], backbone).fold())
    swapped = methods.attach(backbone, "vpt_deep", num_classes=CLASSES).eval()
    weights = {path.stem: safetensors.torch.load_file(path) for path in paths}

    def swap(name: str) -> methods.Method:
        swapped.load_state_dict(weights[name], strict=False)
        return swapped

    def draw() -> dict[str, Callable[[], Tensor]]:
        """The forms of one batch, whose tasks are loaded."""
        places = torch.randperm(len(names)).repeat(-(-batch // len(names)))[:batch]
        drawn = [names[place] for place in places]
        for name in drawn:
            models(name)
        return {
            "bare": lambda: backbone(images),
            "bank": lambda: torch.stack(bank(images, drawn)),
            "per_task": lambda: _by_task(drawn, images, models),
            "swap": lambda: _by_task(drawn, images, swap),
            "single": lambda: backbone(images[:1]),
        }

    draw()["single"]()
    each = []
    for _ in range(rounds):
        ran = {form: _run(run) for form, run in draw().items()}
        _check(len(names), {form: logits for form, (logits, _) in ran.items()})
        each.append({form: seconds for form, (_, seconds) in ran.items()})
    return {
        "tasks": len(names),
        "distinct": min(len(names), batch),
        # images a second
        **{form: batch / median(took[form] for took in each) for form in _FORMS},
        "of_bare": median(took["bare"] / took["bank"] for took in each),
        "over_per_task": median(took["per_task"] / took["bank"] for took in each),
        "over_swap": median(took["swap"] / took["bank"] for took in each),
        "batching": median(batch * took["single"] / took["bare"] for took in each),
    }


_FORMS = ("bare", "bank", "per_task", "swap")


def _check(count: int, logits: dict[str, Tensor]) -> None:
    """Refuse logits that are not those of each task's own model."""
    expected = logits["per_task"]
    for form in ("bank", "swap"):
        error = ((logits[form] - expected).abs().max() / expected.abs().max()).item()
        if not error <= TOLERANCE:
            raise InputError(f"{count} tasks, {form}: logits differ by {error:.0e}")


def _by_task(names: list[str], images: Tensor, model: Callable[[str], methods.Method]) -> Tensor:
    """Logits of images, those of a task together."""
    logits = images.new_empty(len(names), CLASSES)
    for name in dict.fromkeys(names):
        own = [place for place, other in enumerate(names) if other == name]
        logits[own] = model(name)(images[own])
    return logits


def _run(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output, and the seconds that it took."""
    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if one_thread else time.perf_counter
    _wait()
    begin = clock()
    output = run()
    _wait()
    return output, clock() - begin


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
