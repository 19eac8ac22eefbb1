"""Class means: the cosine to the mean feature of each class (SimpleCIL, Zhou et al. 2023)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.base import Backbone
from vpt.backbones.text import Tokenizer
from vpt.config import Strict
from vpt.methods.base import Head, Method
from vpt.methods.linear_probe import ABSENT


class CosineHead(Head):
    """Linear classifier of features and weights of norm 1, plus a bias."""

    def forward(self, features: Tensor) -> Tensor:
        """Cosines (B, C) of features (B, feature_dim), in the head's own precision."""
        with torch.autocast(features.device.type, enabled=False):
            features = F.normalize(features.to(self.weight.dtype), dim=-1)
            return F.linear(features, F.normalize(self.weight, dim=-1), self.bias)


class ClassMeans(Method):
    """Rows of `head.weight` (C, feature_dim) are means of features as they come.

    Attributes:
        counts: (C,), how many images each is the mean of.
    """

    solved = True
    frozen_features = True
    statistics = frozenset({"counts"})

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.head = CosineHead(backbone.feature_dim, len(class_names))
        self.register_buffer("counts", torch.zeros(len(class_names)))

    def logits(self, features: Tensor) -> Tensor:
        """Cosines (B, C) of image features (B, feature_dim) to the means."""
        return self.head(features)

    @torch.no_grad()
    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Take features (N, feature_dim) and the labels of N images into the means."""
        truth = self.target.truth(labels, len(self.class_names)).double().to(self.counts.device)
        counts = self.counts * (self.task > 0)
        sums = self.head.weight * counts[:, None] + truth.T @ features.to(truth)
        self.counts.copy_(counts + truth.sum(0))
        self.head.weight.copy_(sums / self.counts.clamp(min=1)[:, None])
        self.head.bias.copy_(ABSENT * (self.counts == 0))
