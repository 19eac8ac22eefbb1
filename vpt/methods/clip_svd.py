"""CLIP-SVD: the singular values of both towers' weights (Koleilat et al. 2025)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpt.methods._changed import Change, ChangedTowers
from vpt.methods._templates import TemplateOptions


class CLIPSVD(ChangedTowers):
    """Trains what is added to each singular value of attention and MLP weights of all blocks.

    Query, key and value are decomposed apart, in double precision, which takes a minute for
    ViT-B/16 on a CPU. Differences are trained and stored, so weight decay pulls to the pretrained
    weights; in the original it shrinks the singular values themselves, and a matrix whose smaller
    side is no multiple of 4 loses its smallest.
    """

    Options = TemplateOptions

    def change(self, weights: Sequence[Tensor]) -> Change:
        """Differences of the parts' singular values."""
        return Singular(weights)


class Singular(Change):
    """Differences (parts, rank) of the singular values of weights that stand one after the other.

    Attributes:
        differences: in descending order of the singular values.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        stacked = torch.stack(list(weights)).detach()
        left, values, right = torch.linalg.svd(stacked.double(), full_matrices=False)
        self.differences = nn.Parameter(torch.zeros_like(values, dtype=stacked.dtype))
        self.register_buffer("left", left.to(stacked.dtype), persistent=False)
        self.register_buffer("right", right.to(stacked.dtype), persistent=False)

    def delta(self) -> Tensor:
        """The change (parts · out, in)."""
        return ((self.left * self.differences[:, None]) @ self.right).flatten(0, 1)
