"""CLIP-LoRA: low-rank changes of queries, keys and values in both towers (Zanella et al. 2024)."""

import math
from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.methods._changed import Change, ChangedTowers
from vpt.methods._templates import TemplateOptions


class Options(TemplateOptions):
    """Options of CLIP-LoRA."""

    rank: PositiveInt = 2
    alpha: float = Field(1.0, gt=0)  # the change is alpha / √rank · B·A
    dropout: float = Field(0.0, ge=0, lt=1)  # on the change's input; published: .25


class CLIPLoRA(ChangedTowers):
    """A of each of query, key and value, and B that starts at 0, in all blocks."""

    Options = Options
    attention_only = True

    def change(self, weights: Sequence[Tensor]) -> Change:
        """Low-rank changes of the parts."""
        return LowRank(weights, self.options)


class LowRank(Change):
    """Low-rank changes of `parts` weights (out, in) that stand one after the other."""

    def __init__(self, weights: Sequence[Tensor], options: Options) -> None:
        super().__init__()
        (out, width), rank = weights[0].shape, options.rank
        bound = 1 / math.sqrt(width)  # Kaiming's with a = √5
        self.A = nn.Parameter(weights[0].new_empty(len(weights), rank, width))
        nn.init.uniform_(self.A, -bound, bound)
        self.B = nn.Parameter(weights[0].new_zeros(len(weights), out, rank))
        self.scale, self.dropout = options.alpha / math.sqrt(rank), options.dropout

    def delta(self) -> Tensor:
        """The change (parts · out, in)."""
        return self.scale * (self.B @ self.A).flatten(0, 1)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The changed layer's output, in training with a dropout mask for each part."""
        if not (self.training and self.dropout):
            return super().forward(x, weight, bias)
        pairs = zip(self.A, self.B, strict=True)
        parts = [F.dropout(x, self.dropout) @ a.mT @ b.mT for a, b in pairs]
        return F.linear(x, weight, bias) + self.scale * torch.cat(parts, -1)
