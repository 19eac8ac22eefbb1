"""L2P: prompts of a pool, picked by each image's own features (Wang et al. 2022)."""

from collections.abc import Sequence

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vpt.backbones.base import Backbone, Prompts
from vpt.backbones.text import Tokenizer
from vpt.errors import InputError
from vpt.methods._query import PullOptions, QueryPrompts, cosines


class Options(PullOptions):
    """Options of L2P."""

    pool: PositiveInt = 10
    chosen: PositiveInt = 5  # prompts an image
    num_tokens: PositiveInt = 5  # of a prompt
    layer: NonNegativeInt = 0  # before which the tokens stand


class L2P(QueryPrompts):
    """The `chosen` prompts whose keys are nearest the query; the mean of their outputs is read.

    Each image picks its own: in the official code's defaults those of the batch's majority serve
    all, so that a sorted test set gives its tasks away. There each token also has the position
    embedding of the class token, a constant.

    Attributes:
        prompts: (pool, num_tokens, width).
        keys: (pool, feature_dim of the backbone), which the pull alone trains.
    """

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Make the pool.

        Raises:
            InputError: more prompts chosen than there are; a block that there is not.
        """
        super().__init__(backbone, class_names, options, tokenizer)
        if options.chosen > options.pool:
            raise InputError(f"method.chosen={options.chosen}: the pool has {options.pool}")
        if options.layer >= backbone.num_layers:
            raise InputError(f"method.layer={options.layer}: the last is {backbone.num_layers - 1}")
        prompts = torch.empty(options.pool, options.num_tokens, backbone.widths[options.layer])
        self.prompts = nn.Parameter(prompts.uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(options.pool, backbone.feature_dim).uniform_(-1, 1))

    @property
    def feature_dim(self) -> int:
        """Width of a prompt's output."""
        return self.backbone.widths[-1]

    def first_layer(self) -> int:
        """The block of the option `layer`."""
        return self.options.layer

    def pick(self, query: Tensor) -> Prompts:
        """The nearest prompts of each image."""
        ids = cosines(query, self.keys).topk(self.options.chosen).indices
        return Prompts([self.prompts[ids].flatten(1, 2)], [self.options.layer], read=True)

    def read(self, images: Tensor, prompts: Prompts | None, begin: int = 0) -> Tensor:
        """Mean of the prompts' outputs after the final norm."""
        return self.backbone.tokens(images, prompts, begin).prompts.mean(1)

    def penalties(self, query: Tensor) -> dict[str, Tensor]:
        """Pull the keys to the queries that picked them."""
        nearest = cosines(query, self.keys).topk(self.options.chosen).values
        return {"pull": -self.options.pull * nearest.sum(1).mean()}
