"""DualPrompt: rows for all tasks, and for each task, found by its key (Wang et al. 2022b)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.methods._query import PullOptions, QueryPrompts, as_rows, cosines, num_heads
from vpt.methods._tokens import check_layers


class Options(PullOptions):
    """Options of DualPrompt."""

    # None: 0 and 1, then 2 to 4, as published; in towers of fewer than 5 blocks fewer
    general_layers: list[int] | None = None
    task_layers: list[int] | None = None
    general_rows: PositiveInt = 5
    task_rows: PositiveInt = 5  # 20 in the paper
    pool: PositiveInt = 10  # tasks
    # each layer has keys of its own, as CODA-Prompt's copy has it, and may find another task
    keys_per_layer: bool = False


class DualPrompt(QueryPrompts):
    """Keys and values beside a block's own, after its projections.

    In training those of the task, at test those of the nearest key, of each image apart.

    Attributes:
        general: (layers, 2, general_rows, width), keys and values.
        prompts: (layers, 2, pool, task_rows, width).
        keys: (1 or layers, pool, feature_dim), which the pull alone trains.
    """

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make both kinds of rows.

        Raises:
            InputError: blocks that take no rows; a layer of both kinds.
        """
        super().__init__(backbone, class_names, options, tokenizer)
        self.heads = num_heads(backbone, self.name)
        self.general_layers, self.task_layers = self._layers()
        width, rows = backbone.width, (options.general_rows, options.task_rows)
        general = torch.empty(len(self.general_layers), 2, rows[0], width)
        prompts = torch.empty(len(self.task_layers), 2, options.pool, rows[1], width)
        sets = len(self.task_layers) if options.keys_per_layer else 1
        self.general = nn.Parameter(general.uniform_(-1, 1))
        self.prompts = nn.Parameter(prompts.uniform_(-1, 1))
        self.keys = nn.Parameter(
            torch.empty(sets, options.pool, backbone.feature_dim).uniform_(-1, 1)
        )

    def _layers(self) -> tuple[list[int], list[int]]:
        """General and task layers.

        Raises:
            InputError: not ascending block numbers; one that is both.
        """
        count = self.backbone.num_layers
        general, task = self.options.general_layers, self.options.task_layers
        if general is None:
            general = list(range(min(2, count // 2)))
        if task is None:
            task = [layer for layer in range(count) if layer not in general][:3]
        if general:
            check_layers(general, count)
        if both := set(general) & set(check_layers(task, count)):
            raise InputError(f"method.task_layers={task}: {sorted(both)} are general_layers too")
        return general, task

    def first_layer(self) -> int:
        """The first with rows of either kind."""
        return min(self.general_layers + self.task_layers)

    def begin_task(self, task: int, count: int) -> None:
        """The task's rows start as those of the task before."""
        super().begin_task(task, count)
        if 0 < task < self.options.pool:
            with torch.no_grad():
                self.prompts[:, :, task] = self.prompts[:, :, task - 1]

    def found(self, query: Tensor) -> Tensor:
        """The task of each image (1 or layers, B): in training the present one."""
        if self.training and self.task < self.options.pool:
            return torch.full((len(self.keys), len(query)), self.task, device=query.device)
        return cosines(query, self.keys).argmax(-1)

    def pick(self, query: Tensor) -> Prompts:
        """General rows, and those of each image's task."""
        ids = self.found(query).expand(len(self.task_layers), -1)
        sets = [as_rows(rows[:, None], self.heads) for rows in self.general]
        sets += [
            as_rows(rows[:, chosen], self.heads)
            for rows, chosen in zip(self.prompts, ids, strict=True)
        ]
        layers = self.general_layers + self.task_layers
        order = sorted(range(len(layers)), key=layers.__getitem__)
        return Prompts([sets[i] for i in order], sorted(layers))

    def penalties(self, query: Tensor) -> dict[str, Tensor]:
        """Pull the task's keys to the queries."""
        similarity = cosines(query, self.keys).gather(-1, self.found(query)[..., None])
        return {"pull": -self.options.pull * similarity.sum(0).mean()}
