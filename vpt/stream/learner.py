"""Learners of a stream: a method and a strategy, stage by stage, each a run of its own."""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from vpt import losses
from vpt.data.fewshot import Split
from vpt.data.sources import Samples
from vpt.errors import InputError
from vpt.evaluation.decision import resampled_metrics
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods.linear_probe import ABSENT
from vpt.run import Prepared, Tested, fit, write
from vpt.stream.config import StreamConfig
from vpt.stream.stages import Stage
from vpt.stream.tasks import Task, join, remembered
from vpt.training.setup import attach


@dataclass(eq=False)
class Learner:
    """Trains on one task after another; its model's logits are of all classes.

    Attributes:
        root: holds a folder a stage.
        config: of the stream.
        whole: the prepared run of all tasks together.
        tasks: in order.
        model: the model now.
        rows: after each stage so far, the accuracy on each task so far.
        records: what each stage so far has written down.
    """

    root: Path
    config: StreamConfig
    whole: Prepared
    tasks: list[Task]
    progress: bool = False
    rows: list[list[float]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.attach()
        self.head = copy.deepcopy(_head(self.model))
        strategy = self.config.stream.strategy
        self.starts_anew = strategy in {"joint", "per_task"}
        if strategy == "rehearsal" and self.model.statistics:
            raise InputError(
                f"{self.model.name} keeps sums over all tasks and needs no image again: give "
                "stream.strategy=sequential"
            )

    @property
    def passes(self) -> float:
        """Passes of the image tower that a test image takes."""
        return self.model.passes

    def learn(self, number: int) -> None:
        """Do stage `number`, unless its files say that it is done.

        Raises:
            InputError: a file of a stage that is done is not as it was left.
        """
        stage = Stage(self.root, number)
        for earlier in range(number):
            Stage(self.root, earlier).read()
        if self.starts_anew:
            self.model = self.attach()
        record = stage.read()
        if record:
            stage.restore(self.model)
            self._keep(number)
        else:
            record = self._train(number, stage)
            stage.write(record)
        self.rows.append(record["accuracies"])
        self.records.append(record)

    def _train(self, number: int, stage: Stage) -> dict[str, Any]:
        seed = self.config.train.seed + number * (not self.starts_anew)
        set_seed(seed)
        if not self.starts_anew:
            self.model.begin_task(number, len(self.tasks))
        prepared = self._prepared(number, stage)
        before = self._enter(number)
        history = fit(prepared, lambda line: None, self.progress)
        self._leave(number, before)
        self._keep(number)
        stage.write_statistics(self.model)
        tested, measured = self._test(number, prepared)
        result = write(prepared, history, tested)
        statistics = stage.statistics.stat().st_size if stage.statistics.is_file() else 0
        return {
            "task": self.tasks[number].name,
            **measured,
            "seconds": result["train_seconds"],
            "megabytes": stage.folder.prompt.stat().st_size / 1e6,
            "megabytes_between_tasks": statistics / 1e6,
            "num_train": len(prepared.split.train),
            "num_test": len(tested.labels),
        }

    def attach(self) -> Method:
        """The model before its first step, always the same draws."""
        set_seed(self.config.train.seed)
        return attach(self.whole.model.backbone, self.whole.source, self.config)

    def _keep(self, number: int) -> None:
        """Called with each stage's final model."""

    def _prepared(self, number: int, stage: Stage) -> Prepared:
        train, classes = self._training(number)
        test = join([task.test for task in self.tasks[: number + 1]])
        split = Split(train, None, test, self.whole.split.hash)
        return replace(
            self.whole,
            config=self.config,
            setting=self.config,
            folder=stage.folder,
            split=split,
            model=self.model,
            duplicates=[],
            loss=among(self.config.train.loss, classes, self.model),
        )

    def _training(self, number: int) -> tuple[Samples, list[int]]:
        """Images to train on, and the classes that the loss compares."""
        task, earlier = self.tasks[number], [task.train for task in self.tasks[:number]]
        strategy, memory = self.config.stream.strategy, self.config.stream.memory
        if strategy == "joint":
            return join([*earlier, task.train]), self._seen(number)
        if strategy == "rehearsal" and earlier:
            return join([task.train, remembered(join(earlier), memory)]), self._seen(number)
        return task.train, task.classes

    def _seen(self, number: int) -> list[int]:
        return sorted({label for task in self.tasks[: number + 1] for label in task.classes})

    def _enter(self, number: int) -> nn.Linear | None:
        """Give the head's rows of new classes their start; a copy of the head then."""
        head = _head(self.model)
        if head is None:
            return None
        seen = self._seen(number - 1) if number else []
        _copy_rows(head, self.head, sorted(set(range(len(head.bias))) - set(seen)))
        return copy.deepcopy(head)

    def _leave(self, number: int, before: nn.Linear | None) -> None:
        """Undo what training did to the rows of other classes; those of later ones are off."""
        head = _head(self.model)
        if head is None or before is None:
            return
        _, classes = self._training(number)
        others = sorted(set(range(len(head.bias))) - set(classes))
        _copy_rows(head, before, others)
        later = sorted(set(range(len(head.bias))) - set(self._seen(number)))
        with torch.no_grad():
            head.bias[later] = ABSENT

    def _test(self, number: int, prepared: Prepared) -> tuple[Tested, dict[str, Any]]:
        """Metrics on all tasks so far, and the accuracy on each."""
        logits, labels = prepared.outputs(prepared.split.test)
        hidden = torch.ones(logits.shape[1], dtype=torch.bool)
        hidden[self._seen(number)] = False
        logits = logits.masked_fill(hidden, -torch.inf)
        return tested(prepared, logits, labels), {
            "accuracies": self._accuracies(number, logits.argmax(1) == labels)
        }

    def _accuracies(self, number: int, right: Tensor) -> list[float]:
        """Accuracy on each task up to `number`, of whose test images some are `right` (N,)."""
        parts = right.double().split([len(task.test) for task in self.tasks[: number + 1]])
        return [part.mean().item() for part in parts]


def among(loss: str, classes: list[int], model: Method) -> type[Loss] | None:
    """The loss called `loss` of logits of `classes` alone; None where no step trains."""
    if model.solved:
        return None
    base = losses.find(loss)

    class Among(base):  # type: ignore[misc, valid-type]
        def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
            hidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            hidden[classes] = False
            return super().__call__(logits.masked_fill(hidden, -torch.inf), labels)

    Among.name = base.name
    return Among


def tested(prepared: Prepared, logits: Tensor, labels: Tensor) -> Tested:
    """The metrics of a stage's result."""
    target, names = prepared.model.target, prepared.source.class_names
    patients = prepared.split.test.patients
    intervals = resampled_metrics(target, logits, labels, names, patients, None)
    return Tested(logits, labels, target.metrics(logits, labels), intervals, None)


def _head(model: Method) -> nn.Linear | None:
    """The head whose rows are of a class each and stay when other classes are learned."""
    return None if model.statistics else getattr(model, "head", None)


def _copy_rows(head: nn.Linear, source: nn.Linear, rows: list[int]) -> None:
    with torch.no_grad():
        head.weight[rows], head.bias[rows] = source.weight[rows], source.bias[rows]
