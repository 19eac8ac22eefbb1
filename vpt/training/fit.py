"""The training loop: accelerate for devices, one resumable checkpoint an epoch."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader

from vpt import losses
from vpt.accelerator import make_accelerator
from vpt.config import EngineConfig, TrainConfig
from vpt.data.loaders import CACHE_BYTES
from vpt.errors import InputError
from vpt.evaluation.evaluate import EVAL_BATCH, evaluate, predict
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods.base import Batch, Epoch
from vpt.methods.linear_probe import SPLITS
from vpt.progress import Log, TrainingBar
from vpt.settings import validate
from vpt.training import side_by_side
from vpt.training.checkpoint import read_checkpoint, write_checkpoint
from vpt.training.crossval import Part, assign_splits, judged_parts, training_helps
from vpt.training.dial import FACTORS, choose_factor
from vpt.training.epochs import Record, epochs, make_optimizer, num_epochs, with_epochs
from vpt.training.features import FrozenColumns, current_features, image_features
from vpt.training.side_by_side import num_batches
from vpt.training.training_set import Batches, TrainingSet


def fit(
    model: Method,
    train: DataLoader,
    val: DataLoader | None = None,
    config: TrainConfig | dict[str, Any] | None = None,
    *,
    loss: str | type[Loss] | Loss | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[list[Record]], None] | None = None,
    engine: EngineConfig | None = None,
    progress: bool | TrainingBar = False,
    log: Log = lambda line: None,
) -> list[Record]:
    """Train the tunable parameters of `model`, or fit it at once where that needs no gradients.

    Deterministic on a CPU for one `config.seed`; the random state is set anew for each epoch, so
    a resumed run equals an uninterrupted one.

    Args:
        model: from `vpt.attach`.
        train: batches (images (B, 3, H, W), labels), a mapping of them (`image`, `label`), or
            `vpt.methods.base.Batch`; labels as `Target.conform` takes them.
        val: evaluated after each epoch and written down; never used to choose anything.
        config: a TrainConfig, or its settings; None: its defaults.
        loss: a name under vpt/losses, a class or an instance; None: `config.loss`.
        checkpoint: a file written after each epoch, and continued from where it exists.
        on_epoch: called by the main process after each epoch with all records so far.
        engine: `compile` and `feature_cache` of an EngineConfig; None: neither.
        progress: show a bar with loss, accuracy and the time left; or the bar of a training of
            which this one is a stage.
        log: takes lines for the user.

    Returns:
        One record an epoch: epoch, lr, loss, accuracy, seconds, `terms` (means of those that the
        method's steps name), and val_accuracy where `val` is.

    Raises:
        InputError: no DataLoader; `folds` or cross-fitted heads with one that cannot be taken into
            parts; the loss is not finite; the checkpoint does not belong to this model; a setting
            that TrainConfig does not have; a `loss` that does not fit the method or the labels.
    """
    if not isinstance(train, DataLoader):
        raise InputError(f"fit needs a torch DataLoader to train on, not a {type(train).__name__}")
    if not isinstance(config, TrainConfig):
        config = validate(TrainConfig, config or {}, where="config")
    chosen = find_loss(loss or config.loss, model)
    images = TrainingSet(train, model.target, len(model.class_names))
    engine = engine or EngineConfig()
    accelerator = make_accelerator(config.precision, engine.compile)
    _check(config, model, images, accelerator)
    together, given = side_by_side.fits(model, images), config
    begin = time.perf_counter()
    set_seed(config.seed)
    in_order = images.own or config.folds or model.cross_fitted
    plain = images.batches(images.plain if in_order else train)
    loss = _make(chosen, model, images)
    frozen = _frozen_columns(model, images, config, engine, accelerator, log)
    if images.own and not frozen and (beyond := images.loader.dataset.beyond_store):
        log(
            f"memory: {beyond} of {len(images.loader.dataset)} images do not fit into the "
            f"{CACHE_BYTES / 2**30:g} GiB for decoded ones, so each pass decodes them anew"
        )
    if model.solved:
        if (session := model.first_session()) is not None:
            log(f"{model.name}: {session.name} is trained first")
            fit(session, train, val, given, checkpoint=checkpoint, engine=engine,
                progress=progress, log=log)  # fmt: skip
            model.adopt(session)
        seen = current_features(model, plain, accelerator, frozen)
        return [_solve(model, seen, accelerator, begin)]
    optimizer = make_optimizer(model, config)
    history, kept = read_checkpoint(checkpoint, model, optimizer)
    batch_size = _batch_size(images, accelerator) if together else None
    if history:  # a training goes on as it began; checkpoints of 0.1.0 say nothing of it
        batch_size = kept.get("batch_size")
    if config.min_steps:
        config = with_epochs(config, _num_batches(images, batch_size))
    parts = judged_parts(images, config.folds) if config.folds and not history else []
    with _bar(progress, model, images, parts, config, given, accelerator, batch_size) as bar:
        images.tick = bar.tick
        if together and parts:
            bar.next_stage()
        plain = images.batches(plain.loader)
        shown, ordered = _batches(model, images, plain, frozen, batch_size)
        start = None
        if kept.get("features") is not None and kept["places"] == images.places.tolist():
            labels = torch.from_numpy(images.labels)
            columns = {name: column[: len(labels)] for name, column in ordered.columns.items()}
            start = Batch(kept["features"], labels, columns, cached=True)
        factor = history[0].get("factor", 1.0) if history else 1.0  # that a stopped run had chosen
        if config.folds and not history and together:
            start = image_features(model, ordered, accelerator)
            alone = start._replace(columns={})  # no heads without a split, unless it is trained
            model.before_epoch(Epoch(0, config.epochs, loss, plain, lambda: alone))
            make = partial(_make, chosen, model)
            factor = choose_factor(
                model, images, parts, start, make, given, accelerator, bar.tick, log
            )
            if not factor:
                return [_record(model, _logits(model, start, accelerator), start.labels, begin)]
        elif config.folds and not history:
            helps = _training_helps(
                model, images, parts, chosen, config, engine, accelerator, bar, log
            )
            # training on parts has reset the state that all accelerators share
            accelerator = make_accelerator(config.precision, engine.compile)
            if not helps:
                if bar is not progress:
                    bar.next_stage()
                features = partial(current_features, model, plain, accelerator, frozen)
                model.before_epoch(Epoch(0, config.epochs, loss, plain, features))
                return [_record(model, *predict(model, plain.loader, config.precision), begin)]
        if bar is not progress:
            bar.next_stage()
        bar.update(history, config.epochs)
        done = len(history)
        for record, seen in epochs(
            model,
            optimizer,
            shown,
            ordered,
            frozen,
            loss,
            config,
            accelerator,
            done,
            start,
            factor,
            reuse=batch_size is not None,
        ):
            if val is not None:
                record["val_accuracy"] = evaluate(model, val, config.precision)["accuracy"]
            if config.folds and together:
                record["factor"] = factor
            now = time.perf_counter()
            record["seconds"], begin = now - begin, now
            history.append(record)
            if accelerator.is_main_process:
                if on_epoch:
                    on_epoch(history)
                if checkpoint:
                    kept = {"batch_size": batch_size}
                    if seen:
                        kept |= {"features": seen.inputs, "places": images.places.tolist()}
                    write_checkpoint(checkpoint, model, optimizer, history, **kept)
            bar.update(history, config.epochs)
    model.eval()
    return history


def find_loss(loss: str | type[Loss] | Loss, model: Method) -> type[Loss] | Loss:
    """The loss that is meant.

    Raises:
        InputError: no loss of that name; one that does not fit the labels, or a method without one.
    """
    found = losses.find(loss)
    if model.solved and found.name != "cross_entropy":
        raise InputError(f"train.loss={found.name}: {model.name} is fitted without it: drop it")
    losses.check(found, model.target)
    return found


def _check(
    config: TrainConfig, model: Method, images: TrainingSet, accelerator: Accelerator
) -> None:
    """Refuses what can't be trained."""
    if config.batch_size % accelerator.num_processes:
        raise InputError(
            f"train.batch_size={config.batch_size} cannot be split over "
            f"{accelerator.num_processes} processes: give a multiple"
        )
    if config.folds:
        images.check_parts(f"train.folds={config.folds}")
    if model.cross_fitted:
        images.check_parts("method.head=crossfit")


def _batch_size(images: TrainingSet, accelerator: Accelerator) -> int:
    """Batch size of the steps on all images: the loader's, or that of about BATCHES an epoch."""
    count, processes = len(images.loader.sampler), accelerator.num_processes
    few = processes * math.ceil(count / side_by_side.BATCHES / processes)
    return min(images.loader.batch_size, few)


def _num_batches(images: TrainingSet, batch_size: int | None) -> int:
    """Number of batches in an epoch of all images; `batch_size` None: that of the loader."""
    loader = images.loader
    if not batch_size:
        return len(loader)
    return (math.floor if loader.drop_last else math.ceil)(len(loader.sampler) / batch_size)


def _bar(
    progress: bool | TrainingBar,
    model: Method,
    images: TrainingSet,
    parts: Sequence[Part],
    config: TrainConfig,
    given: TrainConfig,
    accelerator: Accelerator,
    batch_size: int | None,
) -> AbstractContextManager[TrainingBar]:
    """The bar over the parts of cross-validation and the training after them, or a given one.

    `config` has the epochs of all images, `given` those that `min_steps` may still add to.
    """
    if isinstance(progress, TrainingBar):
        return nullcontext(progress)

    def size(batches: int, plain: int) -> int:
        epochs = num_epochs(config, batches)
        return epochs * batches + plain * (epochs + 1 if model.cross_fitted else 1)

    stages = []
    if batch_size:
        count = len(images.places)
        start = math.ceil(count / EVAL_BATCH)
        if parts:
            sizes = [len(seen) for seen, _, _ in parts]
            batches = num_batches(sizes, images.loader.batch_size)
            plain = math.ceil((sum(sizes) + sum(len(held) for _, held, _ in parts)) / EVAL_BATCH)
            steps = num_epochs(given, batches) * batches
            name = f"trying out on {len(parts)} parts"
            stages = [(name, start + steps + plain * len(FACTORS))]
        steps = config.epochs * _num_batches(images, batch_size)
        stages.append(("training", steps + start * (1 if parts else 2)))
        return TrainingBar(stages, bool(progress) and accelerator.is_main_process)
    for number, (seen, _, _) in enumerate(parts, 1):
        batches = math.ceil(len(seen) / images.loader.batch_size)
        plain = math.ceil(len(seen) / EVAL_BATCH)  # once more, for the start
        stages.append((f"trying out, {number} of {len(parts)}", size(batches, plain) + plain))
    try:
        batches = len(images.loader)
    except TypeError:  # an iterable data set may have no length
        batches = 1
    stages.append(("training", size(batches, math.ceil(batches * config.batch_size / EVAL_BATCH))))
    return TrainingBar(stages, bool(progress) and accelerator.is_main_process)


def _make(loss: type[Loss] | Loss, model: Method, images: TrainingSet) -> Loss:
    """The loss for these training images."""
    if isinstance(loss, Loss):
        return loss
    return loss(model.target, images.class_counts)


def _frozen_columns(
    model: Method,
    images: TrainingSet,
    config: TrainConfig,
    engine: EngineConfig,
    accelerator: Accelerator,
    log: Log,
) -> FrozenColumns | None:
    """The columns that are computed once a view; None if there are none, or each batch's differ."""
    if not images.own:
        return None
    few = images.loader.dataset.deterministic or config.views
    if not (model.frozen_features or (few and model.overrides("frozen_columns"))):
        return None
    views, folder = config.views, engine.feature_cache
    return FrozenColumns(model, images.loader, accelerator, views, folder, log)


def _solve(model: Method, seen: Batch, accelerator: Accelerator, begin: float) -> Record:
    model.solve(seen.inputs, seen.labels)
    return _record(model, _logits(model, seen, accelerator), seen.labels, begin)


@torch.no_grad()
def _logits(model: Method, seen: Batch, accelerator: Accelerator) -> Tensor:
    return model.logits(seen.inputs.to(accelerator.device)).cpu()


def _training_helps(
    model: Method,
    images: TrainingSet,
    parts: Sequence[Part],
    loss: type[Loss] | Loss,
    config: TrainConfig,
    engine: EngineConfig,
    accelerator: Accelerator,
    bar: TrainingBar,
    log: Log,
) -> bool:
    """`training_helps` with this configuration."""
    once = config.model_copy(update={"folds": None})
    plainly = engine.model_copy(update={"compile": False})  # a part is too short to pay for it
    return training_helps(
        model,
        images,
        parts,
        _make(loss, model, images).log_weights is not None,
        partial(_start, model, loss, config, accelerator, bar),
        partial(fit, model, loss=loss, config=once, engine=plainly, progress=bar),
        partial(predict, model, precision=config.precision),
        log,
    )


def _start(
    model: Method,
    loss: type[Loss] | Loss,
    config: TrainConfig,
    accelerator: Accelerator,
    bar: TrainingBar,
    loader: DataLoader,
) -> None:
    """Make `model` what it is before its first step on the images of `loader`."""
    bar.next_stage()
    images = TrainingSet(loader, model.target, len(model.class_names))
    images.tick = bar.tick
    batches = images.batches(images.plain)
    features = partial(image_features, model, batches, accelerator)
    model.before_epoch(Epoch(0, config.epochs, _make(loss, model, images), batches, features))


def _batches(
    model: Method,
    images: TrainingSet,
    plain: Batches,
    frozen: FrozenColumns | None,
    batch_size: int | None,
) -> tuple[Batches, Batches]:
    """The batches of steps and those of hooks, numbered where they have columns."""
    if not (frozen or model.cross_fitted):
        return images.batches(images.loader), plain
    columns = {}
    if model.cross_fitted:
        # the last is of images that were not there to be split
        splits = np.append(assign_splits(images, SPLITS), SPLITS)
        columns["split"] = torch.from_numpy(splits)
        columns["place"] = torch.arange(len(splits))
    count = len(images.places)
    loader, ordered = images.numbered(
        np.arange(count),
        other=count,
        batch_size=batch_size,
        unread=frozen is not None and model.frozen_features,
        views=frozen and frozen.views,
    )
    return images.batches(loader, columns), images.batches(ordered, columns)


def _record(model: Method, logits: Tensor, labels: Tensor, begin: float) -> Record:
    """The only record of a method trained without gradient steps."""
    accuracy = (model.target.num_correct(logits, labels) / len(labels)).item()
    return {"epoch": 0, "accuracy": accuracy, "seconds": time.perf_counter() - begin}
