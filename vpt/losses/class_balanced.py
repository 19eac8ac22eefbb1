"""Cross-entropy, classes weighted by their effective number of images (Cui et al. 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor

from vpt.losses.base import Loss
from vpt.targets import Target

BETA = 0.999  # the paper tries 0.9 to 0.9999


class ClassBalanced(Loss):
    """Each image is weighted by its class: 1 / effective number, (1 - β) / (1 - βⁿ) (equation 10).

    The weights have a mean of 1 over the classes.
    """

    def __init__(self, target: Target, counts: Callable[[], Tensor]) -> None:
        super().__init__(target, counts)
        images = counts().clamp(min=1).double()  # a class without images has no loss of its own
        weights = (1 - BETA) / (1 - BETA**images)
        self.log_weights = (weights * len(weights) / weights.sum()).log()
        self.weights = self.log_weights.exp()

    @classmethod
    def fits(cls, target: Target) -> bool:
        """True where an image is of one class."""
        return target.exclusive

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and labels (B,), a scalar."""
        return torch.mean(self.weights.to(logits)[labels] * self.target.losses(logits, labels))
