"""Tip-Adapter: training images as keys of a cache, without training (Zhang et al. 2022)."""

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from vpt.methods._templates import TemplateOptions, Templates, unit


class Options(TemplateOptions):
    """Options of Tip-Adapter; the paper's values for ImageNet."""

    alpha: NonNegativeFloat = 1.0  # of the cache's logits
    beta: NonNegativeFloat = 5.5  # sharpness


class TipAdapter(Templates):
    """Logits are those of the templates + alpha · Σ exp(-beta (1 - cosine to a key)) · its labels.

    Unlike there: alpha and beta are options, not searched on validation images (on ImageNet those
    are the test images); a key is the image's feature without augmentation, not the mean of ten
    views; the scale of the templates' logits is the backbone's own.

    Attributes:
        keys: (N, dim), normalised features of the training images; none before `solve`.
        values: (N, texts), 1 where a text is true of the image.
    """

    Options = Options
    takes_names = False
    solved = True

    def make_state(self) -> None:
        """Make an empty cache."""
        self.keys = nn.Parameter(self.class_embeddings.new_empty(0, self.backbone.feature_dim))
        self.register_buffer("values", self.keys.new_empty(0, len(self.class_names)))

    def make_room(self, tensors: dict[str, Tensor]) -> None:
        """Make as many keys as an artefact has."""
        if "keys" in tensors:
            self._make_room(len(tensors["keys"]))

    def _make_room(self, count: int) -> None:
        self.keys = nn.Parameter(self.keys.new_empty(count, *self.keys.shape[1:]))
        self.values = self.values.new_empty(count, *self.values.shape[1:])

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Keep features (N, feature_dim) and the labels of N images."""
        self._make_room(len(features))
        with torch.no_grad():
            self.keys.copy_(unit(features))
            self.values.copy_(self.target.text_truth(labels, len(self.class_names)))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) of the templates and the cache."""
        similarities = self.backbone.similarity(features, self.class_embeddings)
        if len(self.keys):
            with torch.autocast(features.device.type, enabled=False):
                affinity = unit(features.to(self.keys.dtype)) @ self.keys.T
                found = torch.exp(self.options.beta * (affinity - 1)) @ self.values
            similarities = similarities + self.options.alpha * found
        return self.target.contrast(similarities)
