"""Prompts of several tasks learned at once: one for all, and a rank-one change of it a task."""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from vpt.backbones.base import Prompts
from vpt.errors import InputError
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods.base import Batch, Epoch, Step

PLAIN = ("vpt_deep", "vpt_shallow")  # whose prompts are tensors of tokens, below a head


class Multitask(Method):
    """Tasks of one method, whose prompts are P * (u_k v_k^T) (MPT: Wang et al. 2023, eq. 2).

    A batch mixes tasks: each image has its task's prompts, gates and head. Labels count through the
    classes of all tasks, so that they tell the task. u and v start at ones: each task starts as it
    would alone.

    Attributes:
        tasks: a model each; `after_training` gives it its own prompts, and it needs no other then.
        shared: P, (layers, tokens, width).
        token_factors: u, (K, layers, tokens).
        width_factors: v, (K, layers, width).
    """

    def __init__(self, tasks: Mapping[str, Method]) -> None:
        """`tasks` are attached alike, but to their own classes; all get the backbone of the first.

        Raises:
            InputError: a method that is not plain tokens below a head, or other options than these.
        """
        models = list(tasks.values())
        first = models[0]
        if first.name not in PLAIN:
            raise InputError(f"tasks: {first.name} has no prompts to share: give vpt_deep")
        if first.options.project or first.options.dropout:
            raise InputError("tasks: method.project and method.dropout are of one task: drop them")
        names = [f"{task}/{name}" for task, model in tasks.items() for name in model.class_names]
        super().__init__(first.backbone, names, first.options)
        self.tasks = nn.ModuleList(models)
        self.cross_fitted = first.cross_fitted
        self.shared = nn.Parameter(first.prompts.detach().clone())
        layers, tokens, width = self.shared.shape
        self.token_factors = nn.Parameter(self.shared.new_ones(len(tasks), layers, tokens))
        self.width_factors = nn.Parameter(self.shared.new_ones(len(tasks), layers, width))
        for model in models:
            model.backbone = first.backbone
            model.prompts.requires_grad_(False)
        counts = torch.tensor([len(model.class_names) for model in models])
        self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)

    def task_of(self, labels: Tensor) -> Tensor:
        """Number (B,) of the task that each label belongs to."""
        return torch.bucketize(labels, self.starts, right=True) - 1

    def task_prompts(self) -> Tensor:
        """Prompts (K, layers, tokens, width) of all tasks."""
        return self.shared * self.token_factors[..., None] * self.width_factors[..., None, :]

    def batch_features(self, batch: Batch) -> Tensor:
        """Image features (B, feature_dim), each with the prompts of its task."""
        stacked = Prompts.stack(
            [
                Prompts(list(prompts), task.layers, task.options.position, task.gates)
                for task, prompts in zip(self.tasks, self.task_prompts(), strict=True)
            ]
        )
        return self.read(batch.inputs, stacked.take(self.task_of(batch.labels)))

    def step(self, batch: Batch, loss: Loss) -> Step:
        """The mean over images of their own tasks' losses; logits of other tasks are -inf."""
        features = self.batch_features(batch)
        logits = features.new_full((len(features), len(self.class_names)), -torch.inf)
        total = features.new_zeros(())
        for task, own, columns in self._parts(batch._replace(inputs=features, cached=True)):
            step = task.step(own, loss)
            total = total + step.total * (len(own.labels) / len(features))
            logits[columns] = step.logits.detach().to(logits)
        return Step(total, logits)

    def before_epoch(self, at: Epoch) -> None:
        """Each task's own: solve its head."""
        self._each("before_epoch", at)

    @torch.no_grad()
    def after_training(self, at: Epoch) -> None:
        """Each task's own, and give it the prompts that it has by now."""
        self._each("after_training", at)
        for task, prompts in zip(self.tasks, self.task_prompts(), strict=True):
            task.prompts.copy_(prompts)

    def artifact_tensors(self) -> dict[str, Tensor]:
        """All but the backbone, which tasks hold too."""
        own = super().artifact_tensors()
        return {name: tensor for name, tensor in own.items() if ".backbone." not in name}

    def _each(self, hook: str, at: Epoch) -> None:
        """Call a hook of each task with its own images; features are computed once for all."""

        @cache
        def parts() -> dict[Method, Batch]:
            return {task: own for task, own, _ in self._parts(at.features())}

        for task in self.tasks:
            getattr(task, hook)(at._replace(features=lambda task=task: parts()[task]))

    def _parts(self, batch: Batch) -> list[tuple[Method, Batch, tuple[Tensor, Tensor]]]:
        """Each task with its part of a batch, and where its logits belong: rows and columns."""
        which = self.task_of(batch.labels.to(self.starts.device)).to(batch.labels.device)
        parts = []
        for number, (task, start) in enumerate(zip(self.tasks, self.starts.tolist(), strict=True)):
            rows = (which == number).nonzero()[:, 0]
            if len(rows):
                columns = {name: column[rows] for name, column in batch.columns.items()}
                labels = batch.labels[rows] - start
                own = Batch(batch.inputs[rows], labels, columns, batch.cached)
                classes = torch.arange(len(task.class_names), device=rows.device) + start
                parts.append((task, own, (rows[:, None], classes)))
        return parts
