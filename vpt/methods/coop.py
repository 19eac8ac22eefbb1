"""CoOp: learnable context vectors before the class name (Zhou et al. 2022, trainers/coop.py)."""

import torch
from pydantic import PositiveInt
from torch import nn

from vpt.backbones.text import NamePosition
from vpt.config import Strict
from vpt.methods._text import TextReadout


class Options(Strict):
    """Options of CoOp."""

    num_tokens: PositiveInt = 16  # ignored where `init` gives the words
    init: str | None = None  # words to start from, such as "a photo of a"; None: N(0, 0.02²)
    class_specific: bool = False  # a context for each class
    position: NamePosition = "end"  # of the class name


class CoOp(TextReadout):
    """One context for all images, of all classes or of each class its own.

    Attributes:
        context: (num_tokens, text_width), or (C, num_tokens, text_width) if class-specific.
    """

    Options = Options
    frozen_features = True

    def make_state(self) -> None:
        """Give each class a context of its own, if the option says so."""
        if self.options.class_specific:
            self.takes_names = False
            context = self.context.detach().repeat(len(self.class_names), 1, 1)
            if not self.options.init:
                context = 0.02 * torch.randn_like(context)
            self.context = nn.Parameter(context)

    def name_position(self) -> NamePosition:
        """Position of the class name, as the option says."""
        return self.options.position
