"""MaPLe: image prompts that are linear maps of text prompts (Khattak et al. 2023)."""

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from vpt.config import Strict
from vpt.methods._early import EarlyPrompts
from vpt.methods._text import TextReadout


class Options(Strict):
    """Options of MaPLe."""

    num_tokens: PositiveInt = 2
    depth: PositiveInt = 9  # blocks of both towers with prompts
    init: str | None = "a photo of a"  # words after `num_tokens` stay; None: N(0, 0.02²)


class MaPLe(EarlyPrompts, TextReadout):
    """`context` and `text_prompts` in the text tower, and what `couplings` make of them.

    The depth is at most that of the shallower tower.

    Attributes:
        couplings: Linear(text_width → width) of each prompted block.
    """

    Options = Options
    freezes_words = True

    def make_state(self) -> None:
        """Make the couplings."""
        depth = len(self._text_sets())
        widths = self.backbone.text.width, self.image_width(depth)
        self.couplings = nn.ModuleList(nn.Linear(*widths) for _ in range(depth))

    def text_depth(self) -> int:
        """Blocks of the text tower with prompts: no more than the image tower has."""
        return min(self.options.depth, self.backbone.num_layers)

    @property
    def prompts(self) -> Tensor:
        """Image prompts (depth, num_tokens, width), coupled to those of the text."""
        sets = zip(self.couplings, self._text_sets(), strict=True)
        return torch.stack([coupling(prompts) for coupling, prompts in sets])

    def _text_sets(self) -> list[Tensor]:
        return [self.context, *([] if self.text_prompts is None else self.text_prompts)]
