"""Gated prompts: a learned gate a block says how far it changes them (Yoo et al. 2023).

As in ryongithub/GatedPromptTuning, src/models/vit_prompt/vit_mae.py, without its temperature, which
rescales the frozen attention itself.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.methods import vpt_shallow
from vpt.methods._tokens import TokenOptions
from vpt.methods.base import Method


class Options(TokenOptions):
    """Options of gated prompts; `position` changes nothing."""

    gated: Literal[False] = False  # by gates of another kind
    gate_logit: float = -5.0  # where the gates start: blocks hardly change the prompts


class Prompted(vpt_shallow.Prompted):
    """One set of prompts, each block's output of it mixed with its input: g·output + (1 - g)·input.

    Attributes:
        gates: (num_layers - 1,) logits of g; after the last block no prompt is read.
    """

    Options = Options

    def __init__(self, backbone: Backbone, class_names: Sequence[str], options: Options) -> None:
        super().__init__(backbone, class_names, options)
        self.gates = nn.Parameter(torch.full((backbone.num_layers - 1,), options.gate_logit))

    def features(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the prompted backbone."""
        backbone, last = self.backbone, self.backbone.num_layers - 1
        x = backbone.embed(images)
        prompts = self.batch_prompts(len(images))[0].to(x.dtype)
        count = prompts.shape[-2]
        x = torch.cat([x, prompts.expand(len(images), -1, -1)], 1)
        for index, gate in enumerate(self.gates.sigmoid()):
            x = backbone.enter(index, x, count)
            before, x = x[:, -count:], backbone.remember(backbone.block, index, x)
            x = torch.cat([x[:, :-count], gate * x[:, -count:] + (1 - gate) * before], 1)
        x = backbone.block(last, backbone.enter(last, x, count))
        return backbone.finish(x[:, :-count])

    def fold(self) -> Method:
        """A frozen view: the prompts see the image, so nothing can be computed before."""
        return Method.fold(self)
