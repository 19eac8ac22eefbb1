"""Linear probe: scikit-learn's logistic regression, its penalty cross-validated on the shots."""

import copy
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

from vpt.backbones.base import Backbone
from vpt.backbones.clip import Tokenizer
from vpt.config import Strict
from vpt.errors import InputError
from vpt.methods.base import Head, Method
from vpt.targets import Target

PENALTIES = np.logspace(-5, 2, 15)  # scikit-learn's C, the inverse strength
FIRST = 8  # of PENALTIES that is tried, 0.1
SPLITS = 5
ABSENT = -1e4  # bias of a class without images: never predicted
THREADS = ThreadpoolController()  # of scikit-learn's BLAS


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
        with THREADS.limit(limits=1, user_api="blas"):  # threads would mostly wait for each other
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
        probe = cross_validated(features, labels, count)
    else:
        probe = LogisticRegression(C=penalty or 1.0, max_iter=1000)
    return probe.fit(features, labels), probe.C


def cross_validated(features: np.ndarray, labels: np.ndarray, count: int) -> LogisticRegression:
    """A regression, ready to `fit`, with the penalty of the least log loss on held-out images.

    PENALTIES are walked downhill from FIRST, in float32 and each fit from the last one, where
    `LogisticRegressionCV` tries all. As there, the last fit begins at the mean of those of splits.

    Args:
        features: standardised (N, dim).
        labels: class numbers (N,), of each class `count` or more.
        count: of splits.
    """
    folds = StratifiedKFold(count, shuffle=True, random_state=0)
    parts = list(folds.split(features, labels))
    features = features.astype(np.float32)
    probes = [LogisticRegression(max_iter=1000, warm_start=True)]

    @cache
    def tried(index: int) -> tuple[float, LogisticRegression]:
        losses = []
        for number, (seen, held) in enumerate(parts):
            if number == len(probes):
                probes.append(copy.deepcopy(probes[0]))  # of mostly the same images
            probe = probes[number].set_params(C=float(PENALTIES[index]))
            chances = probe.fit(features[seen], labels[seen]).predict_proba(features[held])
            chances = chances.astype(float) / chances.sum(1, keepdims=True, dtype=float)
            right = chances[np.arange(len(held)), np.searchsorted(probe.classes_, labels[held])]
            losses.append(-np.log(right.clip(min=np.finfo(float).eps)).mean())
        mean = copy.deepcopy(probes[0])
        mean.coef_ = np.mean([probe.coef_ for probe in probes], 0)
        mean.intercept_ = np.mean([probe.intercept_ for probe in probes], 0)
        return float(np.mean(losses)), mean

    best = FIRST
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of steps too small for float32
        for step in (1, -1):
            while 0 <= best + step < len(PENALTIES) and tried(best + step)[0] < tried(best)[0]:
                best += step
    return tried(best)[1]
