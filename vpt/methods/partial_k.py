"""Partial-k: the last k blocks and a linear head (Yosinski et al. 2014, as in Jia et al. 2022)."""

from collections.abc import Iterable, Sequence

import torch
from pydantic import PositiveInt
from torch import nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.errors import InputError
from vpt.methods._linear import LinearOptions, LinearReadout
from vpt.methods._weights import Weights


class Options(LinearOptions):
    """Options of partial-k."""

    k: PositiveInt = 1


class PartialK(Weights, LinearReadout):
    """Trains copies of the last k blocks and of what follows them; all before stays shared."""

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Copy the last k blocks, which train.

        Raises:
            InputError: there are fewer than k blocks.
        """
        if options.k > backbone.num_layers:
            raise InputError(f"method.k={options.k}: the backbone has {backbone.num_layers} blocks")
        super().__init__(backbone, class_names, options, tokenizer)

    def trained(self) -> Iterable[nn.Parameter]:
        """The weights that a backward pass from the features to the last k blocks meets."""
        backbone, first = self.backbone, self.backbone.num_layers - self.options.k
        side, channels = backbone.preprocess.image_size, backbone.preprocess.channels
        parameters = list(backbone.image_tower.parameters())
        with torch.no_grad():
            tokens = backbone.embed(torch.zeros(1, channels, side, side, device=backbone.device))
            for index in range(first):
                tokens = backbone.block(index, backbone.enter(index, tokens, 0))
        backbone.image_tower.requires_grad_(True)
        with torch.enable_grad():  # whatever the caller does
            for index in range(first, backbone.num_layers):
                tokens = backbone.block(index, backbone.enter(index, tokens, 0))
            total = backbone.project(backbone.pool(tokens)).sum()
        met = torch.autograd.grad(total, parameters, allow_unused=True)
        backbone.image_tower.requires_grad_(False)
        return [p for p, gradient in zip(parameters, met, strict=True) if gradient is not None]
