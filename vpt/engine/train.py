"""The training loop: accelerate for devices, one resumable checkpoint an epoch."""

import io
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vpt.artifact import write_atomically
from vpt.config import EngineConfig, TrainConfig, validate
from vpt.engine.accelerator import make_accelerator
from vpt.engine.crossval import assign_folds, training_helps
from vpt.engine.evaluate import evaluate, predict
from vpt.engine.features import FrozenFeatures, image_features
from vpt.engine.losses import log_class_weights, make_criterion
from vpt.engine.progress import EpochBar, Log
from vpt.engine.training_set import TrainingSet
from vpt.errors import InputError
from vpt.methods import Method
from vpt.methods.base import Batch
from vpt.methods.linear_probe import FOLDS

Record = dict[str, Any]


def fit(
    model: Method,
    train: DataLoader,
    val: DataLoader | None = None,
    config: TrainConfig | dict[str, Any] | None = None,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[list[Record]], None] | None = None,
    engine: EngineConfig | None = None,
    progress: bool = False,
    log: Log = lambda line: None,
) -> list[Record]:
    """Train the tunable parameters of `model`, or solve it where that needs no gradients.

    Deterministic on a CPU for one `config.seed`; the random state is set anew for each epoch, so
    a resumed run equals an uninterrupted one.

    Args:
        model: from `vpt.attach`.
        train: batches (images (B, 3, H, W), labels (B,), or (B, C) of a multilabel model).
        val: evaluated after each epoch and written down; never used to choose anything.
        config: a TrainConfig, or its settings; None: its defaults.
        checkpoint: a file written after each epoch, and continued from where it exists.
        on_epoch: called by the main process after each epoch with all records so far.
        engine: `compile` and `feature_cache` of an EngineConfig; None: neither.
        progress: show a bar with loss and accuracy.
        log: takes lines for the user.

    Returns:
        One record an epoch: epoch, lr, loss, accuracy, seconds, and val_accuracy where `val` is.

    Raises:
        InputError: no DataLoader; `folds` or cross-fitted heads with one that cannot be taken into
            parts; the loss is not finite; the checkpoint does not belong to this model; a setting
            that TrainConfig does not have; a `loss` that does not fit the method or the labels.
    """
    if not isinstance(train, DataLoader):
        raise InputError(f"fit needs a torch DataLoader to train on, not a {type(train).__name__}")
    if not isinstance(config, TrainConfig):
        config = validate(TrainConfig, config or {}, where="config")
    engine = engine or EngineConfig()
    accelerator = make_accelerator(config.precision, engine.compile)
    if config.batch_size % accelerator.num_processes:
        raise InputError(
            f"train.batch_size={config.batch_size} cannot be split over "
            f"{accelerator.num_processes} processes: give a multiple"
        )
    check_loss(config.loss, model)
    images = TrainingSet(train, model.target)
    if config.folds:
        images.check_parts(f"train.folds={config.folds}")
    if model.cross_fitted:
        images.check_parts("method.head=crossfit")
    if config.min_steps:
        epochs = max(config.epochs, math.ceil(config.min_steps / max(len(train), 1)))
        warmup = round(config.warmup_epochs * epochs / config.epochs)
        config = config.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})
    begin = time.perf_counter()
    set_seed(config.seed)
    in_order = images.own or config.folds or model.cross_fitted
    plain = shown = images.plain if in_order else train
    _set_loss(model, config.loss, images)
    frozen = None
    if model.frozen_features and images.own:
        views, folder = config.views, engine.feature_cache
        frozen = FrozenFeatures(model, train, accelerator, views, folder, log)

    def features() -> Batch:
        if frozen and train.dataset.deterministic:
            frozen.show(0)
            return frozen.features, frozen.labels
        return image_features(model, shown, accelerator)

    if model.solved:
        seen, labels = features()
        model.solve(seen, labels)
        with torch.no_grad():
            logits = model.logits(seen.to(accelerator.device)).cpu()
        return [_record(model, logits, labels, begin)]
    optimizer = make_optimizer(model, config)
    history = _resume(checkpoint, model, optimizer)
    if config.folds and not history:
        once = config.model_copy(update={"folds": None})
        plainly = engine.model_copy(update={"compile": False})  # a fold is too short to pay for it

        def start(part: DataLoader) -> None:
            part = TrainingSet(part, model.target).plain
            seen = partial(image_features, model, part, accelerator)
            model.before_epoch(0, config.epochs, part, seen)

        learn = partial(fit, model, config=once, engine=plainly)
        answer = partial(predict, model, precision=config.precision)
        balanced = config.loss != "cross_entropy"
        helps = training_helps(model, images, config.folds, balanced, start, learn, answer, log)
        _set_loss(model, config.loss, images)  # those of the folds are of their images
        # and theirs have reset the state that all accelerators share
        accelerator = make_accelerator(config.precision, engine.compile)
        if not helps:
            model.before_epoch(0, config.epochs, plain, features)
            return [_record(model, *answer(plain), begin)]
    if model.cross_fitted:
        train, plain = images.numbered(assign_folds(images, FOLDS), other=FOLDS)
        shown = accelerator.prepare(plain)  # once, so that its workers keep what they have decoded
    # the same batches, of features
    loader = DataLoader(frozen, train.batch_size, sampler=train.sampler) if frozen else train
    step = _Step(model, from_features=frozen is not None)
    step, optimizer, batches = accelerator.prepare(step, optimizer, loader)
    parameters = list(model.tunable_parameters().values())

    with EpochBar(config.epochs, show=progress and accelerator.is_main_process) as bar:
        bar.update(history)
        for epoch in range(len(history), config.epochs):
            set_seed(config.seed + epoch, device_specific=True)
            model.before_epoch(epoch, config.epochs, plain, features)
            if frozen:
                frozen.show(epoch)
            batches.set_epoch(epoch)  # not the sampler's own: accelerate counts from 0 on resuming
            lr = learning_rate(config, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            model.train()
            # summed on the device: nothing waits for the GPU inside an epoch
            sums, seen = torch.zeros(2, device=accelerator.device), 0  # loss, correct
            for batch in batches:
                loss, correct = step(*batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                sums += torch.stack([loss.detach() * len(batch[0]), correct])
                seen += len(batch[0])
            totals = torch.cat([sums, sums.new_tensor([seen])])
            loss, correct, count = accelerator.reduce(totals).tolist()
            if not math.isfinite(loss) or not all(p.isfinite().all() for p in parameters):
                raise InputError(
                    f"the loss is {loss / count:g}, or prompts are not finite, in epoch {epoch}: "
                    f"lower train.lr={config.lr:g}, or give train.precision=fp32"
                )
            if epoch == config.epochs - 1:
                model.after_training(features)
            record = {"epoch": epoch, "lr": lr, "loss": loss / count, "accuracy": correct / count}
            if val is not None:
                record["val_accuracy"] = evaluate(model, val, config.precision)["accuracy"]
            now = time.perf_counter()
            record["seconds"], begin = now - begin, now
            history.append(record)
            if accelerator.is_main_process:
                if on_epoch:
                    on_epoch(history)
                if checkpoint:
                    _write_checkpoint(checkpoint, model, optimizer, history)
            bar.update(history)
    model.eval()
    return history


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
    return torch.optim.AdamW(groups, config.lr, weight_decay=config.weight_decay)


class _Step(nn.Module):
    """A method's loss as a forward pass, so that DistributedDataParallel sees it."""

    def __init__(self, model: Method, from_features: bool) -> None:
        super().__init__()
        self.model = model
        self.loss = model.feature_loss if from_features else model.loss

    def forward(self, inputs: Tensor, labels: Tensor, *folds: Tensor) -> tuple[Tensor, Tensor]:
        loss, logits = self.loss(inputs, labels, *folds)
        return loss, self.model.target.num_correct(logits, labels)


def check_loss(name: str, model: Method) -> None:
    """Refuses a loss that does not fit `model`.

    Raises:
        InputError: another than cross_entropy, on multilabel data or for a method without a loss.
    """
    if name == "cross_entropy":
        return
    if model.solved:
        raise InputError(f"train.loss={name}: {model.name} is solved without it: drop it")
    if not model.target.exclusive:
        raise InputError(f"train.loss={name}: multilabel data has cross_entropy only: drop it")


def _set_loss(model: Method, name: str, images: TrainingSet) -> None:
    """Have `model` train by the loss called `name`, for the training images as they are."""
    model.criterion, model.log_weights = model.target.loss, None
    if name == "cross_entropy":
        return
    labels = [torch.from_numpy(images.labels)] if images.own else [y for _, y in images.loader]
    counts = torch.bincount(torch.cat(labels), minlength=len(model.class_names))
    model.log_weights = log_class_weights(name, counts)
    model.criterion = make_criterion(name, model.log_weights)


def _record(model: Method, logits: Tensor, labels: Tensor, begin: float) -> Record:
    """The only record of a method trained without gradient steps."""
    accuracy = (model.target.num_correct(logits, labels) / len(labels)).item()
    return {"epoch": 0, "accuracy": accuracy, "seconds": time.perf_counter() - begin}


def _resume(
    checkpoint: Path | None, model: Method, optimizer: torch.optim.Optimizer
) -> list[Record]:
    """Load what `_write_checkpoint` wrote; the records of the epochs done."""
    if checkpoint is None or not checkpoint.is_file():
        return []
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{checkpoint}: cannot be continued from ({reason}): delete it to start again"
        ) from None
    return state["history"]


def _write_checkpoint(
    path: Path, model: Method, optimizer: torch.optim.Optimizer, history: list[Record]
) -> None:
    buffer = io.BytesIO()
    state = {"model": model.artifact_tensors(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "history": history}, buffer)
    write_atomically(path, buffer.getvalue())
