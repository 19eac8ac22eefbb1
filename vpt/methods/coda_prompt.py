"""CODA-Prompt: rows that are weighted sums of components, weights from the query (Smith 2023)."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Backbone, Prompts
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.methods._query import QueryOptions, QueryPrompts, as_rows, num_heads
from vpt.methods._tokens import check_layers


class Options(QueryOptions):
    """Options of CODA-Prompt."""

    components: PositiveInt = 100  # of all tasks of a stream together
    num_rows: PositiveInt = 4  # keys, and values, in each layer
    layers: list[int] | None = None  # None: 0 to 4
    orthogonality: NonNegativeFloat = 0.0  # weight of its penalty; 0.1 in the paper


class CODAPrompt(QueryPrompts):
    """Rows Σ aₘ · prompts[m], with aₘ = cos(query · attention[m], keys[m]), without a softmax.

    Each task of a stream has as many components of its own; those before stay as they are, those
    after are zero and so add nothing.

    Attributes:
        prompts: (layers, components, 2 · num_rows, width), keys then values.
        keys: (layers, components, feature_dim).
        attention: likewise.
        begin, end: the components of the present task.
    """

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make the components, all of one task.

        Raises:
            InputError: blocks that take no rows; block numbers that there are not.
        """
        super().__init__(backbone, class_names, options, tokenizer)
        self.heads = num_heads(backbone, self.name)
        default = list(range(min(5, backbone.num_layers)))
        self.layers = check_layers(options.layers or default, backbone.num_layers)
        shape, dim = (len(self.layers), options.components), backbone.feature_dim
        self.prompts = nn.Parameter(torch.zeros(*shape, 2 * options.num_rows, backbone.width))
        self.keys = nn.Parameter(torch.zeros(*shape, dim))
        self.attention = nn.Parameter(torch.zeros(*shape, dim))
        self.begin_task(0, 1)

    def begin_task(self, task: int, count: int) -> None:
        """Draw the task's components, orthogonal to those before.

        Raises:
            InputError: fewer components than tasks.
        """
        super().begin_task(task, count)
        share = self.options.components // count
        if not share:
            raise InputError(
                f"method.components={self.options.components}: {count} tasks need one each"
            )
        self.begin, self.end = task * share, (task + 1) * share
        with torch.no_grad():
            for layer in range(len(self.layers)):
                for tensor in (self.prompts, self.keys, self.attention):
                    draws = torch.randn(share, *tensor.shape[2:]).to(tensor)
                    self.start(tensor[layer], draws)

    def start(self, components: Tensor, draws: Tensor) -> None:
        """Make those of the task (of (components, …)) from standard normal draws."""
        components[self.begin :] = 0
        old = components[: self.begin].flatten(1)
        components[self.begin : self.end] = gram_schmidt(old, draws.flatten(1)).view_as(draws)

    def first_layer(self) -> int:
        """The first of the option `layers`."""
        return self.layers[0]

    def active(self) -> list[Tensor]:
        """Prompts, keys and attention of the tasks so far; only the present one's learn."""
        tensors = [self.prompts, self.keys, self.attention]
        if not self.training:
            return tensors
        begin, end = self.begin, self.end
        return [torch.cat([t[:, :begin].detach(), t[:, begin:end]], 1) for t in tensors]

    def weights(self, query: Tensor) -> Tensor:
        """Weights aₘ (layers, B, M) of the components."""
        _, keys, attention = self.active()
        attended = F.normalize(query[:, None] * attention[:, None], dim=-1)
        return (attended * F.normalize(keys, dim=-1)[:, None]).sum(-1)

    def pick(self, query: Tensor) -> Prompts:
        """Rows of each image."""
        prompts = self.active()[0]
        mixed = torch.einsum("lbm,lmrw->lbrw", self.weights(query), prompts)
        pairs = mixed.unflatten(2, (2, -1)).transpose(1, 2)
        return Prompts([as_rows(pair, self.heads) for pair in pairs], self.layers)

    def penalties(self, query: Tensor) -> dict[str, Tensor]:
        """How far keys, attention and prompts are from orthonormal, if that has a weight."""
        if not self.options.orthogonality:
            return {}
        total = sum(_deviation(tensor) for tensor in self.active())
        return {"orthogonality": self.options.orthogonality * total}


def gram_schmidt(old: Tensor, draws: Tensor) -> Tensor:
    """Draws (N, dim) less their projections on `old` (M, dim) and on each other, of norm 1.

    The classical form on rows as they stand, as in the official code: orthogonal to old ones only
    where these are to each other.
    """
    made: list[Tensor] = []
    for draw in draws:
        others = torch.cat([old, torch.stack(made)]) if made else old
        made.append(draw - (others @ draw / others.square().sum(1)) @ others)
    return F.normalize(torch.stack(made), dim=-1)


def _deviation(tensor: Tensor) -> Tensor:
    """Sum over layers of the mean of (X Xᵀ - 1)², X (components, …) of a layer."""
    rows = tensor.flatten(2)
    identity = torch.eye(rows.shape[1], device=rows.device)
    return (rows @ rows.mT - identity).square().mean((1, 2)).sum()
