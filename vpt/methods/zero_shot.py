"""Zero-shot CLIP: hand-written prompts, an ensemble of templates (Radford et al. 2021, 3.1.4)."""

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vpt.backbones.clip import Adapter, Tokenizer
from vpt.config import Strict
from vpt.methods.base import Method, normalized_mean, require_clip


class Options(Strict):
    """Options of zero-shot classification."""

    templates: list[str] = Field(["a photo of a {}."], min_length=1)

    @field_validator("templates")
    @classmethod
    def _one_name(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} needs {{}} once, for the class name")
        return templates


class Prompted(Method):
    """Class embeddings: the mean over templates of normalised text features. Nothing trains."""

    Options = Options
    solved = True
    frozen_features = True
    reads_text = True

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(require_clip(backbone, "zero_shot"), class_names, options, tokenizer)
        embeddings = embed_classes(backbone, class_names, options.templates, tokenizer)
        self.register_buffer("class_embeddings", embeddings)

    def text_features(self) -> Tensor:
        """Class embeddings (C, dim), not normalised."""
        return self.class_embeddings

    def logits(self, features: Tensor) -> Tensor:
        """Scaled cosine similarities (B, C)."""
        return self.similarities(features, self.class_embeddings)

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Nothing to learn: the templates are the classifier."""


@torch.no_grad()
def embed_classes(
    backbone: Adapter,
    class_names: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """Class embeddings (C, dim): the mean over templates of normalised text features."""
    names = [name.replace("_", " ") for name in class_names]
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = backbone.encode_texts(texts, tokenizer).unflatten(0, (len(names), -1))
    return normalized_mean(features)
