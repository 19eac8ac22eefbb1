"""The image half of learnable tokens in a frozen image tower."""

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones._prompts import map_tensors
from vpt.backbones.base import Backbone, Position, Prompts
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.methods.base import Method


class TokenOptions(Strict):
    """Options of all methods that put tokens into the image tower."""

    num_tokens: PositiveInt = 10
    dropout: float = Field(0.0, ge=0, lt=1)  # on prompts, a mask for each sample
    project: PositiveInt | None = None  # train in this width, map linearly to the model's
    position: Position = "prepend"  # after the class token, or after the last patch
    # True: each block adds what prompts give times a gate that starts at 0, so that training starts
    # from the bare backbone; False: one softmax, as published
    gated: bool = False


class ImagePrompts(Method):
    """Image half whose prompts become constants in the inference form."""

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.constant: ConstantPrompts | None = None  # in the inference form

    def learned_prompts(self, count: int) -> Prompts:
        """Prompts as they are now, for `count` images."""
        raise NotImplementedError

    def image_prompts(self, images: Tensor) -> Prompts:
        """Prompts of all prompted blocks, alike for all images."""
        return self.constant.prompts if self.constant else self.learned_prompts(len(images))

    def make_constants(self) -> None:
        """Keep the prompts' keys and values."""
        super().make_constants()
        self.constant = ConstantPrompts(self.backbone.fold(self.learned_prompts(1)))


class Tokens(ImagePrompts):
    """Image half with prompts before the blocks `layers`.

    Attributes:
        prompts: (len(layers), num_tokens, width), or (…, project) with `project`. Where the blocks
            differ in width (Swin), that of the widest; a narrower one uses the leading columns.
        projection: Linear(project → width), or None.
        gates: of each block from the first of `layers` on, or None: see `LayerPrompts`.

    Raises:
        InputError: gated prompts for blocks of an unknown type.
    """

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: TokenOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
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

    def learned_prompts(self, count: int) -> Prompts:
        """Prompts as they are now; with dropout in training, a set for each of `count` images."""
        prompts = self.layer_prompts()
        if self.training and self.options.dropout:  # masks differ from image to image
            prompts = prompts[:, None].expand(-1, count, -1, -1)
            prompts = F.dropout(prompts, self.options.dropout)
        return Prompts(list(prompts), self.layers, self.options.position, self.gates)

    def turn_gates(self, factor: float) -> None:
        """Multiply all gates."""
        with torch.no_grad():
            self.gates.mul_(factor)

    def layer_prompts(self) -> Tensor:
        """Prompts (len(layers), num_tokens, width) of all prompted blocks."""
        return self.prompts if self.projection is None else self.projection(self.prompts)


class ConstantPrompts(nn.Module):
    """Holds prompts that nothing trains, and moves them with the model."""

    def __init__(self, prompts: Prompts) -> None:
        super().__init__()
        self.prompts = prompts

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> "ConstantPrompts":
        self.prompts = map_tensors(self.prompts, change)
        return super()._apply(change, recurse)


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
