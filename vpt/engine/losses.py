"""Losses for classes of different sizes."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.methods.base import Criterion

BETA = 0.999  # of class_balanced; the paper tries 0.9 to 0.9999


Name = Literal["class_balanced", "logit_adjusted"]


def log_class_weights(name: Name, counts: Tensor) -> Tensor:
    """What the loss adds to the log-odds of each class (C,), where it is lowest.

    Of classes with `counts` (C,) training images. class_balanced: the log of 1 / effective number,
    (1 - β) / (1 - βⁿ), with a mean of 1 over the classes (Cui et al. 2019, equation 10).
    logit_adjusted: minus the log of the class's share (Menon et al. 2021, equation 10, τ = 1).
    """
    counts = counts.clamp(min=1).double()  # a class without images has no loss of its own
    if name == "logit_adjusted":
        return -(counts / counts.sum()).log()
    weights = (1 - BETA) / (1 - BETA**counts)
    return (weights * len(weights) / weights.sum()).log()


def make_criterion(name: Name, log_weights: Tensor) -> Criterion:
    """Mean loss of logits (B, C) and labels (B,), for what `log_class_weights` gives.

    class_balanced: each image weighted by its class's weight. logit_adjusted: softmax cross-entropy
    of logits minus the log-weights; the plain logits are then balanced over the classes.
    """
    if name == "logit_adjusted":
        return lambda logits, labels: F.cross_entropy(logits - log_weights.to(logits), labels)
    weights = log_weights.exp()

    def class_balanced(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return torch.mean(weights.to(logits)[labels] * losses)

    return class_balanced
