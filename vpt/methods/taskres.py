"""TaskRes: a learned change of each class embedding (Yu et al. 2023, trainers/taskres.py)."""

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from vpt.methods._templates import TemplateOptions, Templates


class Options(TemplateOptions):
    """Options of TaskRes."""

    alpha: PositiveFloat = 0.5  # of the residuals; 1 on Flowers there


class TaskRes(Templates):
    """Logits are cosine similarities to the templates' embedding of a class plus its residual.

    Unlike there: names lose their underscores; AdamW for Adam, so that the weight decay is not
    scaled by the gradient's size; one learning rate for all data.

    Attributes:
        residuals: (C, dim), zero at the start.
    """

    Options = Options
    takes_names = False
    keeps_norms = True

    def make_state(self) -> None:
        """Make the residuals."""
        self.residuals = nn.Parameter(torch.zeros_like(self.class_embeddings))

    def text_features(self, features: Tensor | None = None) -> Tensor:
        """Class embeddings (C, dim), differentiable, not normalised."""
        return self.class_embeddings + self.options.alpha * self.residuals
