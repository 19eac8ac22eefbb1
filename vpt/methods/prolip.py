"""ProLIP: the image tower's last projection, held near its start (Fahes et al. 2024)."""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.losses import Loss
from vpt.methods._templates import TemplateOptions, Templates
from vpt.methods.base import Batch, Epoch, Step


class Options(TemplateOptions):
    """Options of ProLIP."""

    # of the squared distance to the start; None: 1 / the mean number of images of a class
    penalty: NonNegativeFloat | None = None


class ProLIP(Templates):
    """Features are pooled @ weight + bias; the loss is cross-entropy + penalty · |weight - start|².

    Where the tower has no linear projection, it is the authors' regularised linear adapter: the
    features as they are, times a weight that starts at the identity.

    Unlike there (astra-vision/ProLIP): the scale of the logits is the backbone's own, not 100; the
    first step sees the first view.

    Attributes:
        weight: (width, dim), or (dim, dim).
        bias: (dim,), which stays.
        penalty: of the distance; computed before the first epoch where the option leaves it open, 1
            until then.
    """

    Options = Options

    def make_state(self) -> None:
        """Start the weight from the tower's projection."""
        projection = linear_projection(self.backbone)
        self.projects = projection is not None
        identity = torch.eye(self.backbone.feature_dim, device=self.backbone.device)
        start, bias = projection or (identity, torch.zeros_like(identity[0]))
        self.weight = nn.Parameter(start.clone())
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.penalty = 1.0 if self.options.penalty is None else self.options.penalty
        self.computed = False

    def project(self, pooled: Tensor) -> Tensor:
        """Features (B, width) before the projection; after it where that is not linear."""
        return pooled if self.projects else super().project(pooled)

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C) of the projected features (B, width)."""
        with torch.autocast(features.device.type, enabled=False):
            projected = features.to(self.weight.dtype) @ self.weight + self.bias
        return super().logits(projected)

    def before_epoch(self, at: Epoch) -> None:
        """Before the first epoch, also of a resumed run, compute the penalty."""
        if self.options.penalty is None and (at.number == 0 or not self.computed):
            truth = self.target.text_truth(at.features().labels, len(self.class_names))
            counts = truth.sum(0).float()
            self.penalty = 1 / counts[counts > 0].mean().item()
            self.computed = True

    def step(self, batch: Batch, loss: Loss) -> Step:
        """Training loss, with the terms `penalty` and that of `loss`."""
        plain = super().step(batch, loss)
        penalty = self.penalty * (self.weight - self.start).square().sum()
        terms = {loss.name: plain.total, "penalty": penalty}
        return Step(plain.total + penalty, plain.logits, terms)


@torch.no_grad()
def linear_projection(backbone: Backbone) -> tuple[Tensor, Tensor] | None:
    """Weight (width, dim) and bias (dim,) of a linear `project`; None where it is anything else."""
    size = backbone.preprocess.image_size
    pooled = backbone.pooled(torch.zeros(1, 3, size, size, device=backbone.device))
    if pooled.dim() != 2:
        return None
    bias = backbone.project(torch.zeros_like(pooled))[0]
    weight = backbone.project(torch.eye(pooled.shape[1], device=backbone.device)) - bias
    features = backbone.project(pooled)
    is_linear = torch.allclose(pooled @ weight + bias, features, rtol=1e-3, atol=1e-4)
    return (weight, bias) if is_linear else None
