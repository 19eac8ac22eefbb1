"""LP++: a linear probe plus weighted texts, steps sized by the data (Huang et al. 2024)."""

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from vpt.methods._templates import TemplateOptions, Templates, unit

ALPHA_EVERY = 10  # steps
ALPHA = 250.0  # times the mean similarity of an image and its text


class Options(TemplateOptions):
    """Options of LP++."""

    steps: NonNegativeInt = 300  # 0: without training


class LPPlusPlus(Templates):
    """Logits are head(f) + alpha · f · text, of normalised features and texts, without a scale.

    Unlike there (FereshteShakeri/FewShot-CLIP-Strong-Baseline): the last step is the result, not
    the best on validation images; the bias starts at 0, not at random; classes may have different
    numbers of images; an image is not augmented. As there, the gradient of alpha is never zeroed.

    Attributes:
        head: Linear(dim → C), from the sums of each class's images.
        alpha: (C,).
    """

    Options = Options
    takes_names = False
    solved = True

    def make_state(self) -> None:
        """Make head and alpha, which `solve` sets."""
        self.head = nn.Linear(self.backbone.feature_dim, len(self.class_names))
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.alpha = nn.Parameter(torch.ones(len(self.class_names)))

    def similarities_to_texts(self, features: Tensor) -> Tensor:
        """Cosines (B, C) of features of norm 1 and the templates' embeddings."""
        return features @ unit(self.class_embeddings).T

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) from image features (B, feature_dim)."""
        with torch.autocast(features.device.type, enabled=False):
            features = unit(features.to(self.alpha.dtype))
            texts = self.alpha * self.similarities_to_texts(features)
            return self.target.contrast(self.head(features) + texts)

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Fit head and alpha to features (N, feature_dim) and the labels of N images."""
        features, labels = unit(features.to(self.alpha)), labels.to(self.alpha.device)
        self.start(features, labels)
        self.descend(features, labels, *self.step_sizes(features), self.options.steps)

    @torch.no_grad()
    def start(self, features: Tensor, labels: Tensor) -> None:
        """Set head and alpha by features (N, dim) of norm 1 and the labels of N images."""
        truth = self.target.text_truth(labels, len(self.class_names)).to(features)
        means = (truth * self.similarities_to_texts(features)).sum(0) / truth.sum(0)
        self.head.weight.copy_(truth.T @ features)
        self.head.bias.zero_()
        self.alpha.fill_(ALPHA * means.nanmean())  # over classes that have images

    def step_sizes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Learning rates of head and alpha from features (N, dim) of norm 1."""
        count, largest = len(features), torch.linalg.matrix_norm(features, 2)
        squares = self.similarities_to_texts(features).square().sum(0)
        return 4 * count / largest**2, count / (4 * squares.max())

    def descend(
        self, features: Tensor, labels: Tensor, lr: Tensor, alpha_lr: Tensor, steps: int
    ) -> list[float]:
        """Take so many steps on all images at once; the losses before each."""
        optimizer = torch.optim.SGD(self.head.parameters(), lr.item(), momentum=0.9)
        losses = []
        for number in range(1, steps + 1):
            loss = self.target.loss(self.logits(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % ALPHA_EVERY == 0:
                with torch.no_grad():
                    self.alpha.sub_(alpha_lr * self.alpha.grad)
            losses.append(loss.item())
        self.zero_grad()
        return losses
