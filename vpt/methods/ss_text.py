"""SS-Text: class means and texts in closed form (Silva-Rodríguez et al. 2025)."""

import torch
from torch import Tensor

from vpt.methods._templates import Prototypes, unit

LEAST = 1e-3  # penalty


class SSText(Prototypes):
    """The prototype of a class is its templates' embedding + scale · sum of its images / (N λ).

    λ penalises the distance to the text: 1 / N, N the number of all images, and at least 0.001
    (jusiro/SS-Text, solvers/sstext.py). Features are of images without augmentation.
    """

    solved = True

    @torch.no_grad()
    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Set the prototypes by features (N, feature_dim) and the labels of N images."""
        features = unit(features.to(self.prototypes))
        truth = self.target.text_truth(labels, len(self.class_names)).to(features)
        self.prototypes.copy_(self.blend(features, truth, self.penalties(truth)))

    def penalties(self, truth: Tensor) -> Tensor:
        """Penalty λ of each class (C,) from what is true of N images (N, C)."""
        return truth.new_full(truth.shape[1:], 1 / len(truth))

    def blend(self, features: Tensor, truth: Tensor, penalties: Tensor) -> Tensor:
        """Prototypes (C, dim).

        Args:
            features: (N, dim), of norm 1.
            truth: (N, C), 1 where a class is the image's.
            penalties: (C,).
        """
        scale = self.backbone.model.logit_scale.exp() / len(features)
        weights = scale / penalties.clamp(min=LEAST)
        return weights[:, None] * (truth.T @ features) + self.class_embeddings
