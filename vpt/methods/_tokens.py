"""Learnable tokens in a frozen image tower: what VPT's methods share."""

import math
from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Backbone, Position
from vpt.errors import InputError
from vpt.methods._probed import ProbedMethod, ProbedOptions
from vpt.methods.base import Method


class TokenOptions(ProbedOptions):
    """Options of all methods that put tokens into the image tower."""

    num_tokens: PositiveInt = 10
    dropout: float = Field(0.0, ge=0, lt=1)  # on prompts, a mask for each sample
    project: PositiveInt | None = None  # train in this width, map linearly to the model's
    position: Position = "prepend"  # after the class token, or after the last patch
    # True: each block adds what prompts give times a gate that starts at 0, so that training starts
    # from the bare backbone; False: one softmax, as published
    gated: bool = False


class TokenMethod(ProbedMethod):
    """Prompts before the blocks `layers`, and a linear head on the backbone's features.

    Attributes:
        prompts: (len(layers), num_tokens, width), or (…, project) with `project`. Where the blocks
            differ in width (Swin), that of the widest; a narrower one uses the leading columns.
        projection: Linear(project → width), or None.
        gates: of each block from the first of `layers` on, or None: see `vpt.backbones.base.Rows`.
        head: Linear(feature_dim → C).

    Raises:
        InputError: gated prompts for blocks of an unknown type.
    """

    Options = TokenOptions

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], options: TokenOptions
    ) -> None:
        super().__init__(backbone, class_names, options)
        self.layers = self.prompted_layers()
        model_width = max(backbone.widths[layer] for layer in self.layers)
        width = options.project or model_width
        bound = init_bound(backbone, options.project or backbone.width)
        prompts = torch.empty(len(self.layers), options.num_tokens, width).uniform_(-bound, bound)
        self.prompts = nn.Parameter(prompts)
        self.projection = None
        if options.project:
            self.projection = nn.Linear(options.project, model_width)
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        self.gates = None
        if options.gated:
            if not backbone.knows_rows:
                raise InputError(
                    f"method.gated=true: {backbone.family} has blocks of an unknown type: give "
                    "method.gated=false method.head=probe, or recipe=paper"
                )
            self.gates = nn.Parameter(torch.zeros(backbone.num_layers - self.layers[0]))

    def prompted_layers(self) -> list[int]:
        """The blocks that get prompts of their own, ascending."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the prompted backbone."""
        prompts = self.batch_prompts(len(images))
        return self.backbone(images, prompts, self.layers, self.options.position, self.gates)

    def batch_prompts(self, count: int) -> Tensor:
        """What `layer_prompts` gives, or with dropout (len(layers), count, num_tokens, width)."""
        prompts = self.layer_prompts()
        if not self.training or not self.options.dropout:
            return prompts
        # masks differ per sample, so the prompts become a set for each
        return F.dropout(prompts[:, None].expand(-1, count, -1, -1), self.options.dropout)

    def layer_prompts(self) -> Tensor:
        """Prompts (len(layers), num_tokens, width) of all prompted blocks."""
        return self.prompts if self.projection is None else self.projection(self.prompts)

    def folded_prompts(self) -> list[Tensor]:
        """What the backbone takes in place of the prompts, computed as far as no image matters."""
        return self.backbone.fold_prompts(self.layer_prompts(), self.layers)

    def fold(self) -> Method:
        """The inference form: keys and values of the prompts computed once."""
        return Folded(super().fold())


class Folded(Method):
    """A prompted model whose prompts' keys and values are constants."""

    is_folded = True

    def __init__(self, method: TokenMethod) -> None:
        super().__init__(method.backbone, method.class_names, method.options)
        self.target = method.target
        self.layers, self.head, self.gates = method.layers, method.head, method.gates
        with torch.no_grad():
            prompts = method.folded_prompts()
        for index, tensor in enumerate(prompts):
            self.register_buffer(f"prompts{index}", tensor)
        self.eval()

    def features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the prompted backbone."""
        prompts = [getattr(self, f"prompts{index}") for index in range(len(self.layers))]
        return self.backbone(images, prompts, self.layers, self.options.position, self.gates)


def init_bound(backbone: Backbone, width: int) -> float:
    """Prompts of `width` start uniform within ± this (KMnP/vpt, src/models/vit_prompt/vit.py)."""
    return math.sqrt(6 / (3 * math.prod(backbone.patch_size) + width))


def check_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """`layers`, or all blocks.

    Raises:
        InputError: not ascending block numbers from 0 to num_layers - 1.
    """
    if layers is None:
        return list(range(num_layers))
    if (
        not layers
        or list(layers) != sorted(set(layers))
        or not 0 <= layers[0] <= layers[-1] < num_layers
    ):
        raise InputError(
            f"method.layers={list(layers)}: give ascending block numbers from 0 to {num_layers - 1}"
        )
    return list(layers)
