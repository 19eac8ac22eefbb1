"""The tasks of a stream: groups of one data set's classes, or a data set each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vpt import resources
from vpt.config import DataConfig
from vpt.data.fewshot import Split, split_data
from vpt.data.sources import Samples, Source, open_source
from vpt.errors import InputError
from vpt.stream.config import StreamConfig


@dataclass(frozen=True, eq=False)
class Task:
    """One stage's images; `classes` are the labels that occur in it."""

    name: str
    classes: list[int]
    train: Samples
    test: Samples


@dataclass(frozen=True, eq=False)
class Stream:
    """All data as one source and split, and its tasks in order."""

    source: Source
    split: Split
    tasks: list[Task]


def open_stream(config: StreamConfig) -> Stream:
    """The data that `config` means.

    Raises:
        InputError: as `open_source` and `split_data`; images of several classes; too few classes.
    """
    stream = _of_classes(config) if config.stream.data is None else _of_sources(config)
    for task in stream.tasks:
        if not len(task.test):
            raise InputError(f"{task.name}: no test image: lower data.shots, or add images")
    return stream


def _of_classes(config: StreamConfig) -> Stream:
    source = open_source(config.data)
    _check_exclusive(source)
    split = split_data(source, config.data)
    count, half = len(source.class_names), config.stream.half
    if half is not None:
        own = list(range(half == "report", count, 2))
        source = replace(source, class_names=[source.class_names[i] for i in own])
        split = replace(
            split, train=_relabelled(split.train, own), test=_relabelled(split.test, own)
        )
        count = len(own)
    if config.stream.tasks * 2 > count:
        raise InputError(
            f"stream.tasks={config.stream.tasks}: {count} classes make at most {count // 2} tasks "
            "of two or more"
        )
    order = np.arange(count)
    if config.stream.shuffle:
        order = np.random.RandomState(config.data.seed).permutation(count)
    tasks = []
    for number, group in enumerate(np.array_split(order, config.stream.tasks), 1):
        parts = (_among(samples, group) for samples in (split.train, split.test))
        tasks.append(Task(f"task {number}", sorted(group.tolist()), *parts))
    return Stream(source, split, tasks)


def _of_sources(config: StreamConfig) -> Stream:
    """A task a data set, whose classes are joined by name."""
    opened: list[tuple[str, Source, Split]] = []
    for item in config.stream.data or []:
        if any(item == other for other, *_ in opened):
            raise InputError(f"stream.data: {item} comes twice: keep one")
        data = _data(config.data, item)
        source = open_source(data)
        _check_exclusive(source)
        try:
            opened.append((item, source, split_data(source, data)))
        except InputError as error:
            raise InputError(f"stream.data: {item}: {error}") from None
    sources = [source for _, source, _ in opened]
    class_names = list(dict.fromkeys(name for source in sources for name in source.class_names))
    tasks = []
    for item, source, split in opened:
        order = np.array([class_names.index(name) for name in source.class_names])
        parts = (_placed(samples, item, order) for samples in (split.train, split.test))
        tasks.append(Task(Path(item).stem, sorted(order.tolist()), *parts))
    first = sources[0]
    train, test = join([task.train for task in tasks]), join([task.test for task in tasks])
    hashed = " ".join(split.hash for *_, split in opened)
    split = Split(train, None, test, hashlib.sha256(hashed.encode()).hexdigest()[:16])
    medical = any(source.medical for source in sources)
    source = replace(
        first,
        name="+".join(task.name for task in tasks),
        card=first.card.model_copy(update={"medical": medical}),
        class_names=class_names,
        augment=config.data.augment or "none",
        parts={"train": train, "test": test},
        notes=[note for source in sources for note in source.notes],
    )
    return Stream(source, split, tasks)


def _data(data: DataConfig, item: str) -> DataConfig:
    """The data that `item` of `stream.data` means."""
    path = (data.root or Path()) / item
    if path.exists():
        return data.model_copy(update={"name": None, "root": path})
    if item in resources.names("datasets"):
        return data.model_copy(update={"name": item, "root": None})
    raise InputError(f"stream.data: {item}: neither {path} nor a card is there: mend the name")


def _check_exclusive(source: Source) -> None:
    if not source.target.exclusive:
        raise InputError(f"{source.name}: a stream needs images of one class each: take other data")


def _among(samples: Samples, classes: Sequence[int] | np.ndarray) -> Samples:
    return samples.take(np.flatnonzero(np.isin(samples.labels, classes)))


def _relabelled(samples: Samples, classes: Sequence[int]) -> Samples:
    """The samples of `classes`, numbered by their place there."""
    chosen = _among(samples, classes)
    return replace(chosen, labels=np.searchsorted(classes, chosen.labels))


def own_labels(task: Task) -> Task:
    """The task with its classes numbered from 0."""
    parts = (_relabelled(samples, task.classes) for samples in (task.train, task.test))
    return Task(task.name, list(range(len(task.classes))), *parts)


def _placed(samples: Samples, item: str, order: np.ndarray) -> Samples:
    """Samples of one of several data sets: named after it, arrays as single images."""
    return replace(
        samples,
        images=list(samples.images),
        labels=order[samples.labels],
        names=[f"{item}/{name}" for name in samples.names],
        patients=None,
    )


def join(many: Sequence[Samples]) -> Samples:
    """All samples, in order."""
    first, *others = many
    for other in others:
        first = first.join(other)
    return first


def remembered(train: Samples, memory: int) -> Samples:
    """The first `memory` training images of each class, in the order that they were drawn."""
    places = [np.flatnonzero(train.labels == label)[:memory] for label in np.unique(train.labels)]
    return train.take(np.sort(np.concatenate(places)))
