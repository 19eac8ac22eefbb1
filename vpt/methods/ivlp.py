"""IVLP: prompts of their own in both towers (Khattak et al. 2023, trainers/independentVL.py)."""

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from vpt.config import Strict
from vpt.methods._early import EarlyPrompts
from vpt.methods._text import TextReadout


class Options(Strict):
    """Options of independent prompts in both towers."""

    num_tokens: PositiveInt = 2  # of the text
    text_depth: NonNegativeInt = 12  # blocks with prompts; 0: the text is fixed, VPT on CLIP
    num_image_tokens: PositiveInt = 2
    image_depth: PositiveInt = 12
    init: str | None = "a photo of a"  # words after `num_tokens` stay; None: N(0, 0.02²)


class IVLP(EarlyPrompts, TextReadout):
    """`context` and `text_prompts` in the text tower, `prompts` in the image tower.

    Depths are at most the towers'; image prompts start from N(0, 0.02²).
    """

    Options = Options
    freezes_words = True

    def make_state(self) -> None:
        """Make the image prompts, from N(0, 0.02²)."""
        depth = min(self.options.image_depth, self.backbone.num_layers)
        shape = depth, self.options.num_image_tokens, self.image_width(depth)
        self.prompts = nn.Parameter(0.02 * torch.randn(shape))

    def text_depth(self) -> int:
        """Blocks of the text tower with prompts, as the option says."""
        return self.options.text_depth
