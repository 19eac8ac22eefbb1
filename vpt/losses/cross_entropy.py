"""The target's own loss: cross-entropy, all classes weighted alike."""

from torch import Tensor

from vpt.losses.base import Loss


class CrossEntropy(Loss):
    """Cross-entropy of a softmax, or of C sigmoids of multilabel data."""

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (B, C) and labels, a scalar."""
        return self.target.loss(logits, labels)
