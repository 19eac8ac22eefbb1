"""The linear read-out: a head on features that also train starts from the linear probe."""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.losses import Loss
from vpt.methods.base import Batch, Epoch, Head, Method, Step
from vpt.methods.linear_probe import ABSENT, SPLITS, solve_head


class LinearOptions(Strict):
    """Options of the linear read-out."""

    # probe: starts from the linear probe of the features before the first step; crossfit: is the
    # linear probe, solved anew before each epoch, and each image's loss is by a probe that was
    # solved without it; random: as most papers do
    head: Literal["probe", "crossfit", "random"] = "probe"


class LinearReadout(Method):
    """Read-out half with a `head`: Linear(feature_dim → C).

    A probe fits the images that it was solved on, whatever their features, so there is little for
    features to learn from it. With `head=crossfit` they learn from the errors on held-out images
    instead (cross-fitting: Chernozhukov et al. 2018), and no step touches the head.

    Attributes:
        starts_small: True for streams of tasks, whose losses compare the task's classes alone: what
            the rows of these have in common stays as it was drawn, and shifts them all.
        penalties: (C,), of the linear probe before the first step, kept for all later ones.
        split_weights: (SPLITS + 1, C, feature_dim) while training, the heads solved without each
            split, and last the one of all images, for an image that no split holds out.
        split_biases: (SPLITS + 1, C).
    """

    Options = LinearOptions
    starts_small: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: LinearOptions,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.head = Head(self.feature_dim, len(class_names))
        if self.starts_small:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.cross_fitted = options.head == "crossfit"
        if self.cross_fitted:
            self.head.requires_grad_(False)
            self.register_buffer("penalties", torch.ones(len(class_names)))
            self.register_buffer("split_weights", torch.empty(0), persistent=False)
            self.register_buffer("split_biases", torch.empty(0), persistent=False)

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) from image features (B, feature_dim)."""
        return self.head(features)

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss: of an image with a `split`, by the head solved without it."""
        if "split" not in batch.columns:
            return super().step(batch, loss)
        features, splits = self.batch_features(batch), batch.columns["split"]
        with torch.autocast(features.device.type, enabled=False):
            weights = self.split_weights.flatten(0, 1)
            logits = F.linear(features.to(weights.dtype), weights, self.split_biases.flatten())
        logits = logits.unflatten(1, self.split_biases.shape)
        logits = logits[torch.arange(len(splits), device=splits.device), splits]
        return Step(loss(logits, batch.labels), logits)

    def before_epoch(self, at: Epoch) -> None:
        """Solve the head and those of splits, unless the option `head` says that steps train it."""
        if self.options.head == "random" or (at.number and not self.cross_fitted):
            return
        seen = at.features()
        penalties = self._solve(self.head, seen, at.loss, self.penalties if at.number else None)
        if self.cross_fitted:
            self.penalties.copy_(penalties)
            self._solve_splits(seen, at.loss)

    def after_training(self, at: Epoch) -> None:
        """Solve the head of what the last epoch made of the features."""
        if self.cross_fitted:
            self._solve(self.head, at.features(), at.loss, self.penalties)

    def _solve_splits(self, seen: Batch, loss: Loss) -> None:
        weights = [self.head.weight] * (SPLITS + 1)
        biases = [self.head.bias] * (SPLITS + 1)
        splits = seen.columns.get("split", torch.empty(0))
        for split in splits[splits < SPLITS].unique().tolist():
            head, rest = copy.deepcopy(self.head), splits != split
            others = Batch(seen.inputs[rest], seen.labels[rest])
            self._solve(head, others, loss, self.penalties)
            alone = head.bias.abs() >= -ABSENT / 2  # of a class that only this split has
            weights[split] = torch.where(alone[:, None], self.head.weight, head.weight)
            biases[split] = torch.where(alone, self.head.bias, head.bias)
        self.split_weights, self.split_biases = torch.stack(weights), torch.stack(biases)

    def _solve(self, head: Head, seen: Batch, loss: Loss, penalties: Tensor | None) -> Tensor:
        """`solve_head`, with the classes weighted as the loss does."""
        penalties = solve_head(head, self.target, seen.inputs, seen.labels, penalties)
        if loss.log_weights is not None:
            with torch.no_grad():
                head.bias.add_(loss.log_weights.to(head.bias))
        return penalties
