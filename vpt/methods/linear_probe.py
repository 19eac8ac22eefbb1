"""Linear probe: scikit-learn's logistic regression, its penalty cross-validated on the shots."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.config import Strict
from vpt.methods.base import Head, Method

PENALTIES = np.logspace(-5, 2, 15)  # scikit-learn's C, the inverse strength
FOLDS = 5
ABSENT = -1e4  # bias of a class without images: never predicted


class Prompted(Method):
    """A `head` (feature_dim → C) on the backbone's features."""

    solved = True
    frozen_features = True

    def __init__(self, backbone: Backbone, class_names: Sequence[str], options: Strict) -> None:
        super().__init__(backbone, class_names, options)
        self.head = Head(backbone.feature_dim, len(class_names))

    def solve(self, features: Tensor, labels: Tensor) -> None:
        """Fit the head to features (N, feature_dim) and labels (N,)."""
        solve_head(self.head, features, labels)


def solve_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Set `head` to the logistic regression of features (N, dim) and labels (N,).

    Its penalty is the best of PENALTIES by the log-loss of FOLDS folds. Features are standardised
    for the fit; the scaling is folded into the weights. With one image of some class nothing can
    be held out, and C stays at 1.
    """
    labels = labels.cpu().numpy()
    scaler = StandardScaler().fit(features.double().cpu().numpy())
    scaled = scaler.transform(features.double().cpu().numpy())
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if folds > 1:
        splits = StratifiedKFold(folds, shuffle=True, random_state=0)
        probe = LogisticRegressionCV(
            Cs=PENALTIES,
            l1_ratios=(0,),
            cv=splits,
            scoring="neg_log_loss",
            max_iter=1000,
            use_legacy_attributes=False,
        )
    else:
        probe = LogisticRegression(max_iter=1000)
    probe.fit(scaled, labels)
    weight, bias = probe.coef_, probe.intercept_
    if len(weight) == 1:  # two classes: scikit-learn keeps one row, the log-odds
        weight, bias = np.stack([-weight[0], weight[0]]) / 2, np.stack([-bias[0], bias[0]]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(ABSENT)
        head.weight[probe.classes_] = head.weight.new_tensor(weight)
        head.bias[probe.classes_] = head.bias.new_tensor(bias)
