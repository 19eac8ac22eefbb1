"""Gated prompts: a learned gate a block says how far it changes them (Yoo et al. 2023).

As in ryongithub/GatedPromptTuning, src/models/vit_prompt/vit_mae.py, without its temperature, which
rescales the frozen attention itself.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from vpt.backbones.base import Backbone, Prompts
from vpt.backbones.clip import Tokenizer
from vpt.methods import vpt_shallow


class Options(vpt_shallow.Options):
    """Options of gated prompts; `position` changes nothing."""

    gated: Literal[False] = False  # by gates of another kind
    gate_logit: float = -5.0  # where the gates start: blocks hardly change the prompts


class GatedPrompts(vpt_shallow.VPTShallow):
    """One set of prompts, each block's output of it mixed with its input: g·output + (1 - g)·input.

    Attributes:
        gates: (num_layers - 1,) logits of g; after the last block no prompt is read.
    """

    Options = Options

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.gates = nn.Parameter(torch.full((backbone.num_layers - 1,), options.gate_logit))

    def learned_prompts(self, count: int) -> Prompts:
        """VPT-shallow's prompts, and what mixes them."""
        return super().learned_prompts(count)._replace(gates=None, mix=self.gates.sigmoid())
