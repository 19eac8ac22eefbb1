"""Any number of classes an image: labels (N, C) are 0 and 1, and each class has a sigmoid."""

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupKFold, KFold
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_recall,
    multilabel_specificity,
)

from vpt.targets.base import ECE_BINS, Labels, Target, as_tensor, misfit


class Multilabel(Target):
    """Each image may have any number of the classes.

    The metrics are means over the classes: of the accuracy of yes and no, of half the sum of
    sensitivity and specificity, and of those areas and F1 that have both; ECE is that of all
    predictions together.
    """

    wording = ", any number an image"

    def fits(self, labels: Labels) -> bool:
        """True for labels (N, C)."""
        return labels.ndim == 2

    def num_classes(self, labels: np.ndarray) -> int:
        """Number of classes, one a column."""
        return labels.shape[1]

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Number of images of each class (C,)."""
        return labels.sum(0).astype(int)

    def reorder(self, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The labels where class i of before is class `order[i]`."""
        return labels[:, np.argsort(order)]

    def draw(self, labels: np.ndarray, shots: int, rng: random.Random) -> list[int]:
        """Indices of random samples that give each class at least `shots` positives.

        Rare classes draw first, so that common ones come along with them and may exceed `shots`. Of
        the images without any label there are `shots` too. What there is less of is taken whole.
        """
        chosen: list[int] = []
        for column in labels.T[np.argsort(labels.sum(0), kind="stable")]:
            missing = max(shots - int(column[chosen].sum()), 0)
            free = np.setdiff1d(np.flatnonzero(column), chosen).tolist()
            chosen += rng.sample(free, min(missing, len(free)))
        empty = np.flatnonzero(~labels.any(1)).tolist()
        return chosen + rng.sample(empty, min(shots, len(empty)))

    def _splitter(
        self, labels: np.ndarray, patients: Sequence[str] | None
    ) -> tuple[type[Any], int]:
        return (GroupKFold if patients else KFold), len(set(patients or range(len(labels))))

    def comparable(
        self, labels: np.ndarray, seen: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """All images; classes of which `seen` has yes or no alone are left out."""
        return held, np.flatnonzero(labels[seen].min(0) == labels[seen].max(0))

    def regressions(
        self, labels: np.ndarray, num_classes: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """A regression of each class that has both yes and no."""
        both = np.flatnonzero(labels.any(0) & ~labels.all(0))
        return [(np.array([index]), labels[:, index].astype(int)) for index in both]

    def blank(self, count: int, num_classes: int) -> np.ndarray:
        """Rows of 0 in the place of labels that images to be predicted do not have."""
        return np.zeros((count, num_classes), np.float32)

    def conform(self, labels: Any, num_classes: int) -> Tensor:
        """Rows (B, C) float32 of 0 and 1, of any type; between them where labels are smoothed."""
        labels = as_tensor(labels)
        fit = labels.ndim == 2 and labels.shape[1] == num_classes
        if not fit or not ((labels >= 0) & (labels <= 1)).all():
            mend = "" if fit else "; for one class an image attach without multilabel"
            raise misfit(labels, f"give rows (B, {num_classes}) of 0 and 1{mend}")
        return labels.float()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of C sigmoids."""
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean over the classes of each image's cross-entropy (N,)."""
        labels = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Divergence of C sigmoids, a scalar."""
        return self.loss(logits, teacher.sigmoid()) - self.loss(teacher, teacher.sigmoid())

    def num_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over images of the proportion of right classes."""
        return ((logits > 0) == labels.bool()).float().mean(1).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoids (N, C)."""
        return logits.sigmoid()

    def scores(self, logits: Tensor) -> Tensor:
        """The logits (N, C): probabilities near 1 are ties in float32."""
        return logits

    def truth(self, labels: Tensor, num_classes: int) -> Tensor:
        """Classes of each image, bool (N, C)."""
        return labels.bool()

    def predicted(self, logits: Tensor) -> Tensor:
        """Classes more probable than not, bool (N, C)."""
        return logits > 0

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
        probabilities = logits.double().sigmoid()  # in float32 those near 1 are ties
        labels = labels.long()
        both = (labels.amin(0) == 0) & (labels.amax(0) == 1)

        def mean(metric: Callable[..., Tensor]) -> float:
            with warnings.catch_warnings(action="ignore"):  # of classes with yes or no alone
                values = metric(probabilities, labels, labels.shape[1], average="none")
            return values[both].mean().item()

        return {
            "accuracy": self.num_correct(logits, labels).item() / len(labels),
            "balanced_accuracy": (mean(multilabel_recall) + mean(multilabel_specificity)) / 2,
            "macro_f1": mean(multilabel_f1_score),
            "auroc": mean(multilabel_auroc),
            "auprc": mean(multilabel_average_precision),
            "ece": self.calibration_error(logits, labels),
        }

    def averages(
        self, hit: Tensor, claimed: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Accuracy of yes and no, half of sensitivity and specificity, and F1 with both."""
        correct = total - positive - claimed + 2 * hit
        sensitivity, specificity = hit / positive, (correct - hit) / (total - positive)
        both = (positive > 0) & (positive < total)
        f1 = torch.where(both, 2 * hit / (claimed + positive), torch.nan)
        return (correct / total).mean(1), (sensitivity + specificity) / 2, f1

    def calibration_error(self, logits: Tensor, labels: Tensor) -> float:
        """Expected calibration error of all classes together."""
        probabilities, truth = logits.sigmoid().flatten(), labels.long().flatten()
        return binary_calibration_error(probabilities, truth, n_bins=ECE_BINS).item()

    def reliability(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The yes of every class: there or not, and its probability (N · C,)."""
        return labels.flatten(), probabilities.flatten()

    def describe(
        self, probabilities: Mapping[str, float], thresholds: Mapping[str, float]
    ) -> dict[str, Any]:
        """`labels`: the classes called, at 0.5 where they have no threshold."""
        least = dict.fromkeys(probabilities, 0.5) | dict(thresholds)
        called = [name for name in probabilities if probabilities[name] >= least[name]]
        return {"labels": called, "probabilities": dict(probabilities)}

    def texts(self, class_names: Sequence[str]) -> list[str]:
        """The names, then their opposites."""
        return [*class_names, *(f"no {name}" for name in class_names)]

    def contrast(self, similarities: Tensor) -> Tensor:
        """Similarity to the class less that to its opposite (CheXzero, Tiu et al. 2022)."""
        present, absent = similarities.chunk(2, dim=-1)
        return present - absent

    def text_truth(self, labels: Tensor, num_classes: int) -> Tensor:
        """Classes of each image, then those that it lacks, bool (N, 2 · C)."""
        truth = self.truth(labels, num_classes)
        return torch.cat([truth, ~truth], 1)
