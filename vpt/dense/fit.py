"""Steps of training: a batch of maps, the model's named losses, AdamW."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from vpt.dense.config import DenseTrainConfig
from vpt.dense.images import Flip, MapSource
from vpt.errors import InputError
from vpt.progress import TrainingBar
from vpt.training.checkpoint import read_checkpoint, write_checkpoint

EVERY = 50  # steps to a record and a checkpoint
FLIPS = {
    "none": [Flip()],
    "horizontal": [Flip(), Flip(True)],
    "both": [Flip(), Flip(True), Flip(False, True), Flip(True, True)],
}
Record = dict[str, Any]


def fit(
    model: Any,
    source: MapSource,
    targets: Callable[[int, Flip], Any],
    config: DenseTrainConfig,
    flips: str,
    checkpoint: Path | None = None,
    on_record: Callable[[list[Record]], None] = lambda records: None,
    progress: bool = False,
) -> list[Record]:
    """Train what `model.tunable_parameters()` names, for so many steps.

    Deterministic on a CPU for one `config.seed`; the random state is set anew after each record,
    so a resumed run equals an uninterrupted one.

    Args:
        model: a Detector or Segmenter.
        source: maps of the training images.
        targets: index of an image and its flip → what `model.loss` takes for it.
        config: settings.
        flips: a key of FLIPS.
        checkpoint: a file written after each record, and continued from where it exists.
        on_record: called after each record with all so far.
        progress: show a bar.

    Returns:
        A record for each EVERY steps: step, lr, loss, the means of its named terms, seconds.

    Raises:
        InputError: the loss is not finite; the checkpoint does not belong to this model.
    """
    named = model.tunable_parameters()
    own = [p for name, p in named.items() if name.startswith("maps.")]
    rest = [p for name, p in named.items() if not name.startswith("maps.")]
    groups = [{"params": rest, "lr": config.lr}, {"params": own, "lr": config.method_lr}]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], weight_decay=config.weight_decay
    )
    records, _ = read_checkpoint(checkpoint, model, optimizer)
    done = records[-1]["step"] if records else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _factor(step, config), last_epoch=done - 1
    )
    random = torch.Generator().manual_seed(config.seed)
    batches = _batches(len(source.images), config.batch_size, random)
    sums: dict[str, float] = {}
    begin = time.perf_counter()
    model.train()
    with TrainingBar([("training", config.steps)], progress) as bar:
        bar.next_stage()
        for step in range(config.steps):
            indices = next(batches)
            drawn = torch.randint(len(FLIPS[flips]), (len(indices),), generator=random)
            if step < done:  # drawn all the same, for what comes after it
                bar.tick()
                continue
            if step % EVERY == 0:
                set_seed(config.seed + step)
            turned = [FLIPS[flips][number] for number in drawn.tolist()]
            pairs = zip(indices, turned, strict=True)
            terms = model.loss(source.batch(indices, turned), [targets(*pair) for pair in pairs])
            loss = torch.stack(list(terms.values())).sum()
            if not math.isfinite(loss.item()):
                raise InputError(f"the loss is not finite in step {step}: lower train.lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            bar.tick()
            if (step + 1) % EVERY == 0 or step + 1 == config.steps:
                count = step % EVERY + 1
                means = {name: total / count for name, total in sums.items()}
                now = time.perf_counter()
                records.append({"step": step + 1, **means, "seconds": now - begin})
                sums, begin = {}, now
                on_record(records)
                if checkpoint:
                    write_checkpoint(checkpoint, model, optimizer, records)
    model.eval()
    return records


def _factor(step: int, config: DenseTrainConfig) -> float:
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps - warmup)))


def _batches(count: int, size: int, random: torch.Generator) -> Iterator[Sequence[int]]:
    """Batches without end, each image once before any comes again; the last of a turn is full."""
    left: list[int] = []
    size = min(size, count)
    while True:
        if len(left) < size:
            left += torch.randperm(count, generator=random).tolist()
        batch, left = left[:size], left[size:]
        yield batch
