"""CLAP: the zero-shot-initialised probe, held near its start (Silva-Rodríguez et al. 2024)."""

import torch
from torch import Tensor

from vpt.losses import Loss
from vpt.methods.base import Batch, Epoch, Step
from vpt.methods.zs_lp import ZSLP


class CLAP(ZSLP):
    """The loss is cross-entropy + mean over classes of λ · |prototype - its start|².

    λ of a class is the mean zero-shot probability of the right label over its images: a class that
    the templates know is held more firmly. One without images, where λ is not a number there, gets
    the mean of the others. λ is of images without augmentation; there, of all views.

    Attributes:
        penalties: λ (C,), computed before the first epoch; 1 until then.
    """

    def make_state(self) -> None:
        """Make the prototypes and their penalties."""
        super().make_state()
        self.computed = False
        self.register_buffer("penalties", torch.ones(len(self.class_names)), persistent=False)

    def before_epoch(self, at: Epoch) -> None:
        """Before the first epoch, also of a resumed run, compute the penalties."""
        if at.number == 0 or not self.computed:
            seen = at.features()
            self.penalties.copy_(self.confidence(seen.inputs, seen.labels))
            self.computed = True

    @torch.no_grad()
    def confidence(self, features: Tensor, labels: Tensor) -> Tensor:
        """Mean zero-shot probability (C,) of the right label over each class's images.

        Args:
            features: (N, feature_dim).
            labels: of N images.
        """
        features, labels = features.to(self.class_embeddings), labels.to(self.penalties.device)
        logits = self.similarities(features, self.class_embeddings)
        right = torch.exp(-self.target.losses(logits, labels))
        truth = self.target.text_truth(labels, len(self.class_names)).to(right)
        means = right @ truth / truth.sum(0)
        return means.nan_to_num(means.nanmean().item())

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss, with the terms `penalty` and that of `loss`."""
        plain, penalty = super().step(batch, loss), self.penalty()
        terms = {loss.name: plain.total, "penalty": penalty}
        return Step(plain.total + penalty, plain.logits, terms)

    def penalty(self) -> Tensor:
        """Mean over classes of λ times the squared distance to the start, a scalar."""
        distances = (self.prototypes - self.class_embeddings).square().sum(1)
        return (self.penalties * distances).mean()
