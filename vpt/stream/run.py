"""A whole stream: a folder with a run a task, its plot and its metrics."""

import json
from pathlib import Path
from typing import Any

import torch

from vpt.config import MethodConfig, to_yaml
from vpt.errors import InputError
from vpt.files import write_atomically
from vpt.folder import RunFolder
from vpt.progress import Log
from vpt.run import NOTICE, Prepared, finished, prepare
from vpt.stream.config import StreamConfig, load_stream
from vpt.stream.learner import Learner
from vpt.stream.metrics import summary
from vpt.stream.per_task import PerTask, Router
from vpt.stream.plot import draw_stream
from vpt.stream.tasks import Task, open_stream


def run_stream(
    config: StreamConfig, *, resume: bool = False, log: Log = print, progress: bool = True
) -> dict[str, Any]:
    """Learn a stream of tasks and test after each; returns the contents of result.json.

    Test images carry no task id. Everything that can be wrong with the input is checked before the
    first file is written.

    Args:
        config: from `vpt.stream.config.load_stream`.
        resume: go on where an interrupted stream stopped; a finished one is returned as it is.
        log: takes lines for the user.
        progress: show a bar of the epochs.

    Raises:
        InputError: bad input; a folder that holds another run, or a stage that was changed.
    """
    folder = RunFolder(config.folder)
    _check(config)
    if done := finished(folder, config, resume, load_stream):
        return done
    stream = open_stream(config)
    config = config.model_copy(update={"out": config.folder})
    whole = prepare(config, log, data=(stream.source, stream.split))
    learner = _learner(folder.path, config, whole, stream.tasks, progress)
    control = _control(folder.path, config, whole, stream.tasks, progress)
    write_atomically(folder.config, to_yaml(config).encode())
    for number, task in enumerate(stream.tasks):
        learner.learn(number)
        if control is not None:
            control.learn(number)
        row = learner.rows[-1]
        log(f"{task.name}: accuracy {sum(row) / len(row):.1%}, mean of the tasks so far")
    result = _result(config, whole, learner, control)
    lines = {learner.model.name: learner.rows}
    if control is not None:
        lines["without prompts"] = control.rows
    names = [task.name for task in stream.tasks]
    title = f"{learner.model.name}, {config.stream.strategy}, {whole.source.name}"
    picture = draw_stream(title, lines, names, result.get("notice", ""))
    write_atomically(folder.path / "accuracy.png", picture)
    write_atomically(folder.result, json.dumps(result, indent=2).encode())
    return result


def _check(config: StreamConfig) -> None:
    """Refuse what a single run has and a stream has not."""
    given = {"init_from": config.init_from, "tests": config.tests, "tasks": config.tasks}
    for key, value in given.items():
        if value:
            raise InputError(f"{key}: not for a stream: drop it")
    if config.auto is not None:
        raise InputError("auto: a stream needs one method: name it, such as vpt stream ranpac")


def _learner(
    root: Path, config: StreamConfig, whole: Prepared, tasks: list[Task], progress: bool
) -> Learner:
    if config.stream.strategy != "per_task":
        return Learner(root, config, whole, tasks, progress)
    router = Router.of(root / "router", config, whole, tasks)
    return PerTask(root, config, whole, tasks, progress, router=router)


def _control(
    root: Path, config: StreamConfig, whole: Prepared, tasks: list[Task], progress: bool
) -> Learner | None:
    """Result without prompts: the head alone, fitted in the same way; None if there are none."""
    backbone = whole.model.backbone
    size = backbone.preprocess.image_size
    blank = torch.zeros(1, backbone.preprocess.channels, size, size, device=backbone.device)
    if whole.model.image_prompts(blank) is None:
        return None
    solved = config.method.options.get("head", "random") != "random" or whole.model.solved
    method = MethodConfig(name="linear_probe" if solved else "linear_head")
    config = config.model_copy(update={"method": method})
    return _learner(root / "without_prompts", config, whole, tasks, progress)


def _stored_images(learner: Learner) -> int:
    """Images of earlier tasks that the last stage trains on again."""
    last = len(learner.tasks) - 1
    return learner.records[last]["num_train"] - len(learner.tasks[last].train)


def _result(
    config: StreamConfig, whole: Prepared, learner: Learner, control: Learner | None
) -> dict[str, Any]:
    last = learner.records[-1]
    sizes = [len(task.test) for task in learner.tasks]
    weighted = sum(a * n for a, n in zip(learner.rows[-1], sizes, strict=True)) / sum(sizes)
    result = {
        "accuracy_matrix": learner.rows,
        **summary(learner.rows),
        "final_accuracy_of_images": weighted,
        **({"notice": NOTICE} if whole.source.medical else {}),
    }
    if control is not None:
        rows = control.rows
        result["without_prompts"] = {
            "method": control.model.name, "accuracy_matrix": rows, **summary(rows)
        }  # fmt: skip
    if "known_task" in last:
        rows = [record["known_task_accuracies"] for record in learner.records]
        result["known_task"] = {"accuracy_matrix": rows, **summary(rows)}
        result["router_accuracy"] = [record["router_accuracy"] for record in learner.records]
    if config.published:
        result["published"] = [each.model_dump() for each in config.published]
    return result | {
        "tasks": [task.name for task in learner.tasks],
        "classes": [
            [whole.source.class_names[label] for label in task.classes] for task in learner.tasks
        ],
        "seconds": [record["seconds"] for record in learner.records],
        "megabytes": [record["megabytes"] for record in learner.records],
        "megabytes_between_tasks": last["megabytes_between_tasks"],
        "stored_images": _stored_images(learner),
        "passes": learner.passes,
        "method": learner.model.name,
        "strategy": config.stream.strategy,
        "backbone": config.backbone.name,
        "fingerprint": whole.model.backbone.fingerprint()[:16],
        "data": whole.source.name,
        "shots": config.data.shots,
        "num_train": [len(task.train) for task in learner.tasks],
        "num_test": sizes,
        "seed": config.data.seed,
        "config_hash": config.hash,
        "split_hash": whole.split.hash,
    }
