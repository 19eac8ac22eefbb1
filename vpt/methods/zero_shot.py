"""Zero-shot CLIP: hand-written prompts, an ensemble of templates (Radford et al. 2021, 3.1.4)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.backbones.clip import Adapter
from vpt.backbones.text import Tokenizer
from vpt.methods._templates import TemplateOptions, Templates, unit
from vpt.methods._text import embed_templates


class Options(TemplateOptions):
    """Options of zero-shot classification."""

    # all: each template counts alike; best: the one of the lowest loss on the training images;
    # weighted: weights, of sum 1, of the lowest loss
    choose: Literal["all", "best", "weighted"] = "all"


class ZeroShot(Templates):
    """Class embeddings: the mean over templates of normalised text features. Nothing trains.

    With `choose` the templates are chosen or weighted on the training images, and on no others.

    Attributes:
        template_weights: (templates,), of `choose`.
        template_embeddings: (C, templates, dim), normalised, of `choose`.
    """

    Options = Options
    solved = True
    from_names = frozenset({"class_embeddings"})

    def __init__(
        self,
        backbone: Adapter,
        class_names: Sequence[str],
        options: Options,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        if options.choose == "all":
            self.register_buffer("class_embeddings", self.class_embeddings)  # stored
            return
        self.from_names = frozenset()
        texts = unit(embed_templates(backbone, class_names, options.templates, tokenizer))
        self.register_buffer("template_embeddings", texts, persistent=False)
        self.register_buffer("template_weights", torch.full_like(texts[0, :, 0], 1 / len(texts[0])))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), not normalised."""
        if self.options.choose == "all":
            return self.class_embeddings
        return self._weighted(self.template_weights)

    def _weighted(self, weights: Tensor) -> Tensor:
        return torch.einsum("t,ctd->cd", weights, self.template_embeddings)

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Choose or weigh the templates on features (N, feature_dim) and the labels of N images."""
        if self.options.choose == "all":
            return
        count = len(self.template_weights)
        features, labels = features.to(self.template_weights), labels.to(self.backbone.device)

        def loss(weights: Tensor) -> Tensor:
            return self.target.loss(self.similarities(features, self._weighted(weights)), labels)

        if self.options.choose == "best":
            each = torch.eye(count).to(features)
            losses = torch.stack([loss(weights) for weights in each])
            self.template_weights.copy_(F.one_hot(losses.argmin(), count))
            return
        scores = torch.zeros(count).to(features).requires_grad_()
        optimizer = torch.optim.LBFGS([scores], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            now = loss(scores.softmax(0))
            now.backward()
            return now

        optimizer.step(closure)
        self.template_weights.copy_(scores.detach().softmax(0))
