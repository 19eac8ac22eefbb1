"""Cross-entropy of logits plus the classes' log proportions (Menon et al. 2021)."""

from collections.abc import Callable

from torch import Tensor

from vpt.losses.base import Loss
from vpt.targets import Target


class LogitAdjusted(Loss):
    """In training, logits plus the log of each class's proportion (equation 10, τ = 1).

    The plain logits are then balanced over the classes.
    """

    def __init__(self, target: Target, counts: Callable[[], Tensor]) -> None:
        super().__init__(target, counts)
        images = counts().clamp(min=1).double()  # a class without images has no loss of its own
        self.log_weights = -(images / images.sum()).log()

    @classmethod
    def fits(cls, target: Target) -> bool:
        """True where an image is of one class."""
        return target.exclusive

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and labels (B,), a scalar."""
        return self.target.loss(logits - self.log_weights.to(logits), labels)
