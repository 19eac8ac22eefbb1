"""Tip-Adapter-F: Tip-Adapter whose keys are then trained (Zhang et al. 2022, main.py)."""

from collections.abc import Sequence

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from vpt.methods import tip_adapter
from vpt.methods.tip_adapter import TipAdapter


class Options(tip_adapter.Options):
    """Options of Tip-Adapter-F."""

    lr: PositiveFloat = 1e-3  # of AdamW, by a cosine to 0 over all steps
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 256


class TipAdapterF(TipAdapter):
    """Keys are trained by AdamW; values and templates stay.

    The last step is the result: there, the epoch with the best accuracy on test images. Images are
    not augmented, so that one pass over them is all.
    """

    Options = Options

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Keep features (N, feature_dim) and the labels of N images, then train the keys."""
        super().solve(features, labels)
        features, labels = features.to(self.keys), labels.to(self.keys.device)
        orders = [torch.randperm(len(features)) for _ in range(self.options.epochs)]
        rows = [rows for order in orders for rows in order.split(self.options.batch_size)]
        self.descend([(features[row], labels[row]) for row in rows])

    def descend(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """Train the keys by a step on each batch of features and labels; the losses before each."""
        optimizer = torch.optim.AdamW([self.keys], self.options.lr, eps=1e-4, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        losses = []
        for features, labels in batches:
            loss = self.target.loss(self.logits(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses
