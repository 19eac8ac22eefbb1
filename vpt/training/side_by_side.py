"""Trains copies of a prompted model on parts of the images, side by side in the same batches."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from vpt.backbones.base import Prompts
from vpt.config import TrainConfig
from vpt.evaluation.evaluate import EVAL_BATCH
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods._linear import LinearReadout
from vpt.methods._regressions import regressions
from vpt.methods._tokens import Tokens
from vpt.methods.base import Batch
from vpt.methods.linear_probe import ABSENT, SPLITS
from vpt.training.epochs import learning_rate, make_optimizer
from vpt.training.training_set import TrainingSet

BATCHES = 4  # an epoch at least: a step on few images teaches as much and costs less

Read = Callable[[Tensor], Tensor]  # places → images (B, 3, H, W)


def fits(model: Method, images: TrainingSet) -> bool:
    """True for gated prompts with cross-fitted heads, one class an image and one view of each."""
    return (
        isinstance(model, Tokens)
        and isinstance(model, LinearReadout)
        and model.gates is not None
        and not model.options.dropout
        and model.cross_fitted
        and model.target.exclusive
        and not model.overrides("pixels", "read", "features")
        and type(model).before_epoch is LinearReadout.before_epoch
        and type(model).step is LinearReadout.step
        and type(model).learned_prompts is Tokens.learned_prompts
        and not (images.own and images.loader.dataset.augment)
    )


def num_batches(sizes: Sequence[int], batch_size: int) -> int:
    """How many batches an epoch has of parts of so many images; each has an image in each."""
    return min(max(math.ceil(max(sizes) / batch_size), BATCHES), *sizes)


class SideBySide:
    """S copies of a model with closed gates; each learns from a part of N images.

    A sample of a batch has the prompts and the heads of its copy, so that one pass of the tower
    trains all. A copy becomes what it would alone, in as many batches. Heads are those of
    `LinearReadout`, cross-fitted before each epoch to features as the steps before computed them.

    Attributes:
        models: the copies.
        features: (S, N, dim), of each image as the copies last saw it.
    """

    def __init__(
        self,
        model: Method,
        start: Batch,
        read: Read,
        splits: Tensor,
        losses: Sequence[Loss],
        accelerator: Accelerator,
    ) -> None:
        """Copies of `model` as it is.

        Args:
            model: which `fits`, its `penalties` chosen.
            start: features (N, dim) of all images as of now, on the CPU, and their labels.
            read: the images at places.
            splits: (S, N), the split in which a part cross-fits an image; SPLITS: it only learns
                from it; -1: it does not.
            losses: of each part.
            accelerator: of the training.
        """
        alone = {id(model.backbone): model.backbone}
        self.models = [copy.deepcopy(model, dict(alone)).eval() for _ in splits]
        self.backbone, self.read = model.backbone, read
        self.labels, self.penalty = start.labels, model.penalties[0].item()
        self.classes = len(model.class_names)
        self.splits, self.losses, self.accelerator = splits, losses, accelerator
        self.start = start.inputs.expand(len(splits), -1, -1)
        self.features = self.start.clone()
        self._solved: tuple[Tensor, Tensor] | None = None

    def train(self, config: TrainConfig, batches: int, tick: Callable[[], None]) -> None:
        """Take the steps of all epochs, `batches` in each; `tick` is called after each step."""
        optimizers = [make_optimizer(model, config) for model in self.models]
        orders = [torch.Generator().manual_seed(config.seed) for _ in self.models]
        seen = [(own >= 0).nonzero()[:, 0] for own in self.splits]
        for epoch in range(config.epochs):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate(config, epoch)
            drawn = [
                own[torch.randperm(len(own), generator=order)].tensor_split(batches)
                for own, order in zip(seen, orders, strict=True)
            ]
            self._cross_fit()
            for batch in zip(*drawn, strict=True):
                self._loss(batch)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                tick()

    def logits(self, needed: Tensor, factor: float, tick: Callable[[], None]) -> Tensor:
        """Logits (S, N, C) where `needed` (S, N), with gates times `factor` and heads to match.

        A copy's head is solved on the images that it learns from; at a factor of 0 on features as
        they were at the start.
        """
        features = self.features.clone() if factor else self.start
        for rows in needed.nonzero().split(EVAL_BATCH) if factor else ():
            parts, places = rows.unbind(1)
            with torch.no_grad():
                features[parts, places] = self._run(parts, places, factor).to(features)
            tick()
        weights, biases = self._heads(features, (self.splits >= 0)[:, None])
        return features @ weights[:, 0].mT + biases[:, :1]

    def _loss(self, batch: Sequence[Tensor]) -> None:
        """Gradients of all parts' losses on their images at places `batch`."""
        lengths = torch.tensor([len(places) for places in batch])
        parts, places = torch.arange(len(batch)).repeat_interleave(lengths), torch.cat(list(batch))
        features = self._run(parts, places, 1.0)
        self.features[parts, places] = features.detach().to(self.features)
        own = parts, self.splits[parts, places]
        weights, biases = (each[own].to(features.device) for each in self._cross_fitted)
        logits = (weights @ features.to(weights)[..., None])[..., 0] + biases
        labels = self.labels[places].to(features.device)
        losses = [
            loss(*part)
            for loss, *part in zip(
                self.losses,
                logits.split(lengths.tolist()),
                labels.split(lengths.tolist()),
                strict=True,
            )
        ]
        self.accelerator.backward(torch.stack(losses).sum())

    def _run(self, parts: Tensor, places: Tensor, factor: float) -> Tensor:
        """Features (B, dim) of images at `places` by the copies `parts`."""
        images, index = places.unique(return_inverse=True)
        device = self.backbone.device
        with self.accelerator.autocast():
            prompts = Prompts.stack([model.learned_prompts(1) for model in self.models])
            prompts = prompts._replace(gates=prompts.gates * factor)
            prompts = self.backbone.fold(prompts).take(parts.to(device))
            inputs = self.read(images).to(device)
            pooled = self.backbone.pooled(inputs, prompts, index.to(device))
            return self.backbone.project(pooled)

    def _cross_fit(self) -> None:
        """Heads (S, SPLITS + 1) without each split, and last of all that a part learns from."""
        used = torch.stack([(self.splits >= 0) & (self.splits != n) for n in range(SPLITS)], 1)
        used = torch.cat([used, (self.splits >= 0)[:, None]], 1)
        weights, biases = self._heads(self.features, used)
        alone = biases <= ABSENT / 2  # of a class that only this split has
        self._cross_fitted = (
            torch.where(alone[..., None], weights[:, -1:], weights),
            torch.where(alone, biases[:, -1:], biases),
        )

    def _heads(self, features: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (S, H, C, dim) and biases of heads solved on the images `used` (S, H, N).

        In the last row, all that a part learns from: there the heads of the next call begin.
        """
        count = used.shape[1]
        start = self._solved and tuple(each.repeat_interleave(count, 0) for each in self._solved)
        weights, biases = regressions(
            features.repeat_interleave(count, 0),
            self.labels.expand(len(used) * count, -1),
            used.flatten(0, 1),
            self.classes,
            self.penalty,
            start,
        )
        weights, biases = (each.unflatten(0, (-1, count)) for each in (weights, biases))
        self._solved = weights[:, -1], biases[:, -1]
        biases = biases.clamp(min=ABSENT)
        for own, loss in zip(biases, self.losses, strict=True):
            if loss.log_weights is not None:
                own += loss.log_weights
        return weights.to(features), biases.to(features)
