"""One run of several data sets: prompts learned together, an artefact and metrics for each."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from vpt.accelerator import processes
from vpt.config import RunConfig, to_yaml
from vpt.data.duplicates import find_duplicates
from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.digests import AUTO
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder, default_folder
from vpt.progress import Log
from vpt.run import Prepared, finished, json_lines, prepare, test, write
from vpt.training import fit as training
from vpt.training.multitask import Multitask

MEANS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
FLOAT = 4  # bytes


def run(
    config: RunConfig, *, resume: bool = False, log: Log = print, progress: bool = True
) -> dict[str, Any]:
    """Train the prompts of `config.tasks` together; returns the contents of result.json.

    The folder holds NAME.safetensors, an artefact of the method alone that needs no other, and the
    run folder NAME with its metrics, for each task. The result has their means, and the bytes of
    prompts: shared, of each task beside it, and of each task as an artefact of its own.

    Args:
        config: with `tasks`.
        resume: continue an interrupted run in its folder; a finished one is returned as it is.
        log: takes lines for the user.
        progress: show a bar of the epochs.

    Raises:
        InputError: as `vpt.run.run`; tasks that do not go together.
    """
    folder = RunFolder(config.out or default_folder(config))
    if done := finished(folder, config, resume):
        return done
    tasks = _prepare(config, folder, log)
    model = Multitask({name: task.model for name, task in tasks.items()})
    samples = join({name: task.split.train for name, task in tasks.items()}, model.starts.tolist())
    train = make_loader(
        samples,
        model.backbone.preprocess,
        config.train.batch_size,
        train=True,
        augment=next(iter(tasks.values())).source.augment,
        seed=config.train.seed,
        workers=config.data.workers,
    )
    main = processes().is_main_process
    processes().wait_for_everyone()  # all have seen whether the folder held a run
    if main:
        write_atomically(folder.config, to_yaml(config).encode())
    history = training.fit(
        model,
        train,
        config=config.train,
        checkpoint=folder.checkpoint,
        on_epoch=lambda records: write_atomically(folder.metrics, json_lines(records)),
        engine=config.engine,
        progress=progress,
        log=log,
    )
    results = {}
    for name, task in tasks.items():
        task.model.prompts.requires_grad_()
        if main:
            write_atomically(task.folder.config, to_yaml(task.config).encode())
        results[name] = write(task, history, test(task, log))
        if main:
            shutil.copy(task.folder.prompt, folder.path / f"{name}.safetensors")
    result = _result(config, model, results)
    if main:
        write_atomically(folder.result, json.dumps(result, indent=2).encode())
        folder.checkpoint.unlink(missing_ok=True)
    return result


def join(tasks: Mapping[str, Samples], starts: list[int]) -> Samples:
    """The samples of all tasks, named after them; labels of each count from its number on."""
    parts = list(zip(tasks.items(), starts, strict=True))
    patients = None
    if any(part.patients for part in tasks.values()):
        patients = [
            f"{task}/{p}" for task, part in tasks.items() for p in part.patients or part.names
        ]
    return Samples(
        [image for part in tasks.values() for image in part.images],
        np.concatenate([part.labels + start for (_, part), start in parts]),
        [f"{task}/{name}" for task, part in tasks.items() for name in part.names],
        patients,
        next(iter(tasks.values())).windows,
    )


def _prepare(config: RunConfig, folder: RunFolder, log: Log) -> dict[str, Prepared]:
    """All tasks, on one backbone; refuses what can't be trained together."""
    if len(config.tasks) < 2:
        raise InputError("tasks: give two or more, as tasks.NAME.root=IMAGES")
    if config.train.folds:
        raise InputError("train.folds: cross-validation is of one task: give train.folds=null")
    if config.train.loss != "cross_entropy":
        raise InputError(f"train.loss={config.train.loss}: tasks have cross_entropy: drop it")
    if (config.init_from or "").startswith(AUTO):
        raise InputError("init_from=auto: chooses for one task: name the artefact")
    tasks: dict[str, Prepared] = {}
    backbone = None
    for name, data in config.tasks.items():
        log(f"task {name}:")
        own = config.model_copy(update={"data": data, "out": folder.path / name})
        tasks[name] = prepare(own, log, backbone)
        backbone = tasks[name].model.backbone
        if not tasks[name].source.target.exclusive:
            raise InputError(f"tasks.{name}: its images have several labels: train it alone")
    first = next(iter(tasks.values()))
    for name, task in tasks.items():
        alike = task.model.backbone.preprocess == first.model.backbone.preprocess
        if not alike or task.split.train.windows != first.split.train.windows:
            raise InputError(
                f"tasks.{name}: another range of grey values or windows: train it alone"
            )
        if task.source.augment != first.source.augment:
            raise InputError(f"tasks.{name}: another augmentation: give data.augment=none")
        _check_apart(name, tasks, config)
    return tasks


def _check_apart(name: str, tasks: Mapping[str, Prepared], config: RunConfig) -> None:
    """Refuses test images of a task that look like training images of another."""
    others = {other: task.split.train for other, task in tasks.items() if other != name}
    if config.data.duplicates in {"warn", "ignore"}:
        return
    seen = join(others, [0] * len(others))
    split = replace(tasks[name].split, train=seen, val=None, calibration=None)
    if pairs := find_duplicates(split, tasks[name].model.backbone.preprocess.grey_range):
        raise InputError(
            f"tasks.{name}: {len(pairs)} test images look like training images of other tasks, "
            f"first {pairs[0].test} like {pairs[0].train}: remove them, or give "
            "data.duplicates=warn"
        )


def _result(
    config: RunConfig, model: Multitask, results: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    def average(metric: str) -> float | None:
        values = [result[metric] for result in results.values()]
        return None if None in values else mean(values)

    first = next(iter(results.values()))
    kept = ("backbone", "fingerprint", "shots", "seed", "version", "torch", "device")
    task, count = model.tasks[0], len(model.tasks)
    gates = 0 if task.gates is None else task.gates.numel()
    factors = (model.token_factors.numel() + model.width_factors.numel()) // count
    return {
        **{metric: average(metric) for metric in MEANS},
        "tasks": {name: result["accuracy"] for name, result in results.items()},
        "shared_bytes": FLOAT * model.shared.numel(),
        "task_bytes": FLOAT * (factors + gates),
        "artefact_bytes": FLOAT * (task.prompts.numel() + gates),
        "num_test": sum(result["num_test"] for result in results.values()),
        "tunable_parameters": sum(p.numel() for p in model.tunable_parameters().values()),
        "trained": True,
        "train_seconds": first["train_seconds"],
        "method": f"multitask {config.method.name}",
        "data": "+".join(results),
        **{key: first[key] for key in kept},
        "config_hash": config.hash,
        "split_hash": "+".join(result["split_hash"] for result in results.values()),
    }
