"""Epochs of gradient steps: what a training is, once everything is prepared."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from vpt.config import TrainConfig
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods.base import Batch, Epoch
from vpt.training.features import FrozenColumns, current_features
from vpt.training.training_set import Batches

Record = dict[str, Any]


def epochs(
    model: Method,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    plain: Batches,
    frozen: FrozenColumns | None,
    loss: Loss,
    config: TrainConfig,
    accelerator: Accelerator,
    done: int,
    known: Batch | None = None,
    factor: float = 1.0,
    reuse: bool = False,
) -> Iterator[tuple[Record, Batch | None]]:
    """Train for the epochs that are not `done`; of each a record, as soon as it is over.

    Hooks before the first of them are given the features `known`; None: those of now. With `reuse`
    those before later ones are given what the steps have computed, if they have seen all images,
    which stands beside the record. After the last one gates are multiplied by `factor`.
    """
    # prepared once, so that its workers keep what they have decoded
    shown = plain.prepared(accelerator) if model.cross_fitted else plain
    current = partial(current_features, model, shown, accelerator, frozen)

    def features() -> Batch:
        return current() if known is None else known

    fresh = model.overrides("frozen_columns") and frozen is None
    step = _Step(model, loss, fresh, keep=reuse)
    step, optimizer = accelerator.prepare(step, optimizer)
    batches = batches.prepared(accelerator)
    for number in range(done, config.epochs):
        set_seed(config.seed + number, device_specific=True)
        at = Epoch(number, config.epochs, loss, plain, current)
        if reuse:
            known = features()
        model.before_epoch(at._replace(features=features))
        if frozen:
            frozen.show(number)
            batches = batches.with_columns(frozen.columns).prepared(accelerator)
        # not the sampler's own: accelerate counts from 0 on resuming
        batches.loader.set_epoch(number)
        lr = learning_rate(config, number)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        means, seen = _steps(step, optimizer, batches, accelerator, reuse)
        known = _updated(known, *seen) if reuse else None
        finite = all(p.isfinite().all() for p in model.tunable_parameters().values())
        if not (finite and math.isfinite(means["loss"])):
            raise InputError(
                f"the loss is {means['loss']:g}, or prompts are not finite, in epoch {number}: "
                f"lower train.lr={config.lr:g}, or give train.precision=fp32"
            )
        model.after_epoch(at)
        if number == config.epochs - 1:
            if factor != 1:
                model.turn_gates(factor)
            model.after_training(at)
        yield {"epoch": number, "lr": lr, **means}, known


def _steps(
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    accelerator: Accelerator,
    keep: bool,
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Take a step on each batch; the means of loss, accuracy and terms over the images.

    With `keep` also the places (M,) and features (M, feature_dim) of what was stepped on.
    """
    # summed on the device: nothing waits for the GPU inside an epoch
    sums, seen, names, kept = 0, 0, (), []
    for batch in batches:
        total, correct, terms, features = step(batch)
        if keep:
            kept.append((batch.columns["place"], features.detach().float()))
        accelerator.backward(total)
        optimizer.step()
        optimizer.zero_grad()
        count, names = len(batch.labels), tuple(terms)
        loss, *parts = (value.detach() * count for value in (total, *terms.values()))
        sums, seen = sums + torch.stack([loss, correct, *parts]), seen + count
    features = tuple(accelerator.gather(torch.cat(parts)) for parts in zip(*kept, strict=True))
    totals = torch.cat([sums, sums.new_tensor([seen])])
    *sums, count = accelerator.reduce(totals).tolist()
    loss, accuracy, *parts = (total / count for total in sums)
    record = {"loss": loss, "accuracy": accuracy}
    if names:
        record["terms"] = dict(zip(names, parts, strict=True))
    return record, features


def _updated(known: Batch, places: Tensor, features: Tensor) -> Batch | None:
    """Copy with these features, the last of each place; None: not all images are among them."""
    # those of images that `known` lacks have the place after the last
    drawn, last = np.unique(places.cpu().numpy()[::-1], return_index=True)
    count = len(known.inputs)
    if not np.array_equal(drawn[:count], np.arange(count)):
        return None
    return known._replace(inputs=features.cpu().flip(0)[last[:count]])


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Learning rate of `epoch`; at most half of the epochs are warm-up.

    cosine: KMnP/vpt, src/solver/lr_scheduler.py. dassl: Dassl, dassl/optim/lr_scheduler.py, whose
    cosine starts after the warm-up but has the period of all epochs, so it never reaches 0.
    """
    warmup, epochs = min(config.warmup_epochs, config.epochs // 2), config.epochs
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "dassl":
        if epoch < warmup:
            return config.warmup_lr
        turn = (epoch - warmup) / epochs
    else:
        if epoch < warmup:
            return config.lr * epoch / warmup
        turn = (epoch - warmup) / (epochs - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * turn))


def with_epochs(config: TrainConfig, batches: int) -> TrainConfig:
    """The configuration with as many epochs of so many batches as `min_steps` needs."""
    epochs = num_epochs(config, batches)
    warmup = round(config.warmup_epochs * epochs / config.epochs)
    return config.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


def num_epochs(config: TrainConfig, batches: int) -> int:
    """Epochs of so many batches that `min_steps` needs."""
    return max(config.epochs, math.ceil((config.min_steps or 0) / max(batches, 1)))


def make_optimizer(model: Method, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW on the tunable parameters, with no weight decay on a head's bias."""
    named = model.tunable_parameters()
    groups = [
        {"params": [p for n, p in named.items() if n != "head.bias"]},
        {"params": [p for n, p in named.items() if n == "head.bias"], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(groups, config.lr, eps=config.eps, weight_decay=config.weight_decay)


class _Step(nn.Module):
    """A method's step as a forward pass, so that DistributedDataParallel sees it."""

    def __init__(self, model: Method, loss: Loss, fresh: bool, keep: bool) -> None:
        """`fresh`: frozen columns are computed for each batch. `keep`: features are given too."""
        super().__init__()
        self.model, self.loss, self.fresh, self.keep = model, loss, fresh, keep

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """Total, number of right predictions, terms, and with `keep` features."""
        if self.fresh:
            with torch.no_grad():
                own = self.model.frozen_columns(batch.inputs)
            batch = batch._replace(columns={**batch.columns, **own})
        features = None
        if self.keep:
            features = self.model.batch_features(batch)
            batch = batch._replace(inputs=features, cached=True)
        step = self.model.step(batch, self.loss)
        correct = self.model.target.num_correct(step.logits, batch.labels)
        return step.total, correct, step.terms, features
