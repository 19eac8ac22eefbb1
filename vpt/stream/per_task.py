"""A model a task, and what finds the task of a test image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from vpt.config import MethodConfig
from vpt.data.sources import Samples, Source
from vpt.methods import Method
from vpt.run import Prepared, Tested
from vpt.stream.config import StreamConfig
from vpt.stream.learner import Learner, tested
from vpt.stream.stages import Stage
from vpt.stream.tasks import Task, join, own_labels
from vpt.training.setup import attach


class Router(Learner):
    """Class means of bare features, the classes of each task apart."""

    @classmethod
    def of(cls, root: Path, config: StreamConfig, whole: Prepared, tasks: list[Task]) -> "Router":
        """A router of `tasks`."""
        names, apart = whole.source.class_names, []
        for task in tasks:
            first = sum(len(other.classes) for other in apart)
            own = own_labels(task)
            parts = (replace(part, labels=part.labels + first) for part in (own.train, own.test))
            apart.append(Task(task.name, [first + label for label in own.classes], *parts))
        called = [f"{n}/{names[i]}" for n, task in enumerate(tasks) for i in task.classes]
        source = replace(whole.source, class_names=called)
        settings = {"method": MethodConfig(name="class_means")}
        stream = config.stream.model_copy(update={"strategy": "sequential"})
        config = config.model_copy(update={**settings, "stream": stream})
        return cls(root, config, replace(whole, source=source), apart)

    def routes(self, number: int) -> Tensor:
        """The task (N,) of each test image of the tasks up to `number`."""
        test = join([task.test for task in self.tasks[: number + 1]])
        logits, _ = replace(self.whole, model=self.model).outputs(test)
        task_of = [index for index, task in enumerate(self.tasks) for _ in task.classes]
        return torch.tensor(task_of)[logits.argmax(1)]


class PerTask(Learner):
    """A model a task. At test, class means of bare features say which task an image is of.

    Attributes:
        router: a learner whose classes are those of each task apart.
        models: those of the tasks so far.
    """

    def __init__(self, *given: Any, router: Router, **more: Any) -> None:
        self.router, self.models = router, []
        super().__init__(*given, **more)

    def attach(self) -> Method:
        """The model of the task that `learn` is at, the first before any."""
        own = replace(self.whole, source=self._source(len(self.rows)))
        set_seed(self.config.train.seed)
        return attach(self.whole.model.backbone, own.source, self.config)

    @property
    def passes(self) -> float:
        """One to find the task, and the task's own."""
        return 1 + self.model.passes

    def learn(self, number: int) -> None:
        """Do stage `number`, the router's before."""
        if len(self.router.rows) == number:
            self.router.learn(number)
        super().learn(number)

    def _source(self, number: int) -> Source:
        names = self.router.whole.source.class_names
        own = [names[i].split("/", 1)[1] for i in self.router.tasks[number].classes]
        return replace(self.whole.source, class_names=own)

    def _keep(self, number: int) -> None:
        self.models.append(self.model)

    def _training(self, number: int) -> tuple[Samples, list[int]]:
        own = own_labels(self.tasks[number])
        return own.train, own.classes

    def _seen(self, number: int) -> list[int]:
        return own_labels(self.tasks[number]).classes

    def _prepared(self, number: int, stage: Stage) -> Prepared:
        prepared = super()._prepared(number, stage)
        split = replace(prepared.split, test=own_labels(self.tasks[number]).test)
        return replace(prepared, source=self._source(number), split=split)

    def _enter(self, number: int) -> nn.Linear | None:
        return None

    def _test(self, number: int, prepared: Prepared) -> tuple[Tested, dict[str, Any]]:
        """The task's own test with its known id; and with the router's, all tasks so far."""
        logits, labels = prepared.outputs(prepared.split.test)
        known = (logits.argmax(1) == labels).double().mean().item()
        earlier = [record["known_task"] for record in self.records]
        found, right_task = self.router.routes(number), []
        test = join([task.test for task in self.tasks[: number + 1]])
        predicted = torch.empty(len(test), dtype=torch.long)
        for index, task in enumerate(self.tasks[: number + 1]):
            places = (found == index).nonzero()[:, 0]
            if len(places):
                own = replace(prepared, model=self.models[index])
                unlabelled = replace(test.take(places.numpy()), labels=np.zeros(len(places), int))
                answer = own.outputs(unlabelled)[0].argmax(1)
                predicted[places] = torch.tensor(task.classes)[answer]
            right_task += [index] * len(task.test)
        truth = torch.from_numpy(test.labels)
        return tested(prepared, logits, labels), {
            "accuracies": self._accuracies(number, predicted == truth),
            "known_task": known,
            "known_task_accuracies": [*earlier, known],
            "router_accuracy": (found == torch.tensor(right_task)).double().mean().item(),
        }
