"""Linear probe: scikit-learn's logistic regression, its penalty cross-validated on the shots."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.methods.base import Head, Method
from vpt.targets import Target

PENALTIES = np.logspace(-5, 2, 15)  # scikit-learn's C, the inverse strength
SPLITS = 5
ABSENT = -1e4  # bias of a class without images: never predicted


class LinearProbe(Method):
    """A `head` (feature_dim → C) on the backbone's features."""

    solved = True
    frozen_features = True

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        options: Strict,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(backbone, class_names, options, tokenizer)
        self.head = Head(backbone.feature_dim, len(class_names))

    def logits(self, features: Tensor) -> Tensor:
        """Logits (B, C) from image features (B, feature_dim)."""
        return self.head(features)

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Fit the head to features (N, feature_dim) and the labels of N images."""
        solve_head(self.head, self.target, features, labels)


def solve_head(
    head: nn.Linear,
    target: Target,
    features: Tensor,
    labels: Tensor,
    penalties: Tensor | None = None,
) -> Tensor:
    """Set `head` to the logistic regressions that `target` makes of `labels`; see `regressions`.

    Features are standardised for the fit; the scaling goes into the weights.

    Args:
        head: Linear(dim → C).
        target: the kind of `labels`.
        features: (N, dim).
        labels: of N images.
        penalties: (C,), scikit-learn's C of each class's regression; None: the best of PENALTIES by
            the log loss of SPLITS splits, or 1 where some class has one image, so that nothing can
            be held out.

    Returns:
        The penalties (C,) that were used; equal where one regression has all classes.

    Raises:
        InputError: labels that are not learnable.
    """
    always = target.truth(labels, len(head.weight)).all(0).cpu().numpy()
    labels = labels.cpu().numpy()
    if not target.learnable(labels):
        raise InputError("all training images are of one class: give images of two or more")
    given = [None] * len(head.weight) if penalties is None else penalties.tolist()
    chosen = torch.ones(len(head.weight))
    scaler = StandardScaler().fit(features.double().cpu().numpy())
    scaled = scaler.transform(features.double().cpu().numpy())
    weight = np.zeros(head.weight.shape)
    bias = np.where(always, -ABSENT, ABSENT)
    for rows, classes in target.regressions(labels, len(weight)):
        probe, penalty = _regression(scaled, classes, given[rows[0]])
        chosen[rows] = penalty
        coefficients, intercepts = probe.coef_, probe.intercept_
        if len(rows) > 1:
            rows = rows[probe.classes_]
            if len(rows) == 2:  # scikit-learn keeps one row, the log-odds
                signs = np.array([-0.5, 0.5])
                coefficients, intercepts = signs[:, None] * coefficients, signs * intercepts
        weight[rows], bias[rows] = coefficients, intercepts
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return chosen


def _regression(
    features: np.ndarray, labels: np.ndarray, penalty: float | None
) -> tuple[LogisticRegression, float]:
    count = min(SPLITS, int(np.bincount(labels)[np.unique(labels)].min()))
    if penalty is None and count > 1:
        splits = StratifiedKFold(count, shuffle=True, random_state=0)
        cross_validated = LogisticRegressionCV(
            Cs=PENALTIES,
            l1_ratios=(0,),
            cv=splits,
            scoring="neg_log_loss",
            max_iter=1000,
            use_legacy_attributes=False,
        ).fit(features, labels)
        return cross_validated, cross_validated.C_
    probe = LogisticRegression(C=penalty or 1.0, max_iter=1000).fit(features, labels)
    return probe, probe.C
