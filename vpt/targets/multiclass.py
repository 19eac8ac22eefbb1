"""One class an image: labels (N,) are class numbers, and logits have one softmax."""

import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from vpt.targets.base import ECE_BINS, Labels, Target, as_tensor, misfit


class Multiclass(Target):
    """Each image is of one class.

    Of the metrics, balanced accuracy is the mean recall; macro-F1, AUROC (one against the rest) and
    AUPRC (average precision) are means over the classes that occur in the labels; the areas are
    None where only one occurs.
    """

    exclusive = True

    def fits(self, labels: Labels) -> bool:
        """True for labels (N,)."""
        return labels.ndim == 1

    def num_classes(self, labels: np.ndarray) -> int:
        """Number of classes, up to the largest number."""
        return labels.max(initial=0) + 1

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Number of images of each class (C,)."""
        return np.bincount(labels, minlength=num_classes)

    def learnable(self, labels: np.ndarray) -> bool:
        """True if there are at least two classes."""
        return len(np.unique(labels)) > 1

    def reorder(self, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The labels where class i of before is class `order[i]`."""
        return order[labels]

    def draw(self, labels: Sequence[int] | np.ndarray, shots: int, rng: random.Random) -> list[int]:
        """Indices of `shots` random samples of each class, classes in order of first appearance.

        The selection of Dassl.pytorch's `DatasetBase.generate_fewshot_dataset` (commit c61a1b5),
        which CoOp's published results use: a class with fewer than `shots` samples is kept whole,
        in order, and draws nothing from `rng`.
        """
        classes: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            classes.setdefault(int(label), []).append(index)
        return [
            index
            for items in classes.values()
            for index in (rng.sample(items, shots) if len(items) >= shots else items)
        ]

    def _splitter(
        self, labels: np.ndarray, patients: Sequence[str] | None
    ) -> tuple[type[Any], int]:
        pairs = set(zip(labels.tolist(), patients or range(len(labels)), strict=True))
        most = np.sort(np.bincount([label for label, _ in pairs]))[-2:][0]
        return (StratifiedGroupKFold if patients else StratifiedKFold), most

    def comparable(
        self, labels: np.ndarray, seen: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images of classes that were seen; no class is left out."""
        return held[np.isin(labels[held], labels[seen])], np.array([], int)

    def regressions(
        self, labels: np.ndarray, num_classes: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """One regression of all classes."""
        return [(np.arange(num_classes), labels)]

    def conform(self, labels: Any, num_classes: int) -> Tensor:
        """Class numbers (B,) int64, of (B, 1), of any type of whole numbers, or of one-hot rows."""
        given = labels = as_tensor(labels)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        elif labels.ndim == 2 and labels.shape[1] == num_classes:
            if not (((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()):
                raise misfit(given, "give one class an image, or attach with multilabel=True")
            labels = labels.long().argmax(1)
        numbers = labels.long()
        if labels.ndim != 1 or (numbers != labels).any():
            raise misfit(given, f"give class numbers (B,), 0 to {num_classes - 1}")
        if not numbers.numel() or (numbers.amin() >= 0 and numbers.amax() < num_classes):
            return numbers
        mend = f"classes count from 0 to {num_classes - 1}"
        if numbers.amin() > 0:
            mend += ", so subtract 1 if yours count from 1"
        if numbers.amin() < 0:
            mend += ": leave out images without a class"
        raise misfit(given, mend)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a softmax."""
        return F.cross_entropy(logits, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each image (N,)."""
        return F.cross_entropy(logits, labels, reduction="none")

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Divergence of softmax probabilities, a scalar."""
        log_probabilities = logits.log_softmax(-1), teacher.log_softmax(-1)
        return F.kl_div(*log_probabilities, reduction="sum", log_target=True) / logits.numel()

    def num_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Number of images whose largest logit is their class's."""
        return (logits.argmax(-1) == labels).sum().float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax (N, C)."""
        return logits.softmax(-1)

    def truth(self, labels: Tensor, num_classes: int) -> Tensor:
        """The class of each image, bool (N, C)."""
        return F.one_hot(labels, num_classes).bool()

    def predicted(self, logits: Tensor) -> Tensor:
        """The class with the largest logit, bool (N, C)."""
        return self.truth(logits.argmax(-1), logits.shape[-1])

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
        probabilities = logits.softmax(-1)
        count = logits.shape[-1]
        present = torch.bincount(labels, minlength=count) > 0
        recall = multiclass_accuracy(probabilities, labels, count, average="none")[present]
        f1 = multiclass_f1_score(probabilities, labels, count, average="none")[present]
        auroc = auprc = None
        if present.sum() > 1:
            with warnings.catch_warnings(action="ignore"):  # of classes that do not occur
                areas = multiclass_auroc(probabilities, labels, count, average="none")
                under = multiclass_average_precision(probabilities, labels, count, average="none")
            auroc, auprc = areas[present].mean().item(), under[present].mean().item()
        return {
            "accuracy": multiclass_accuracy(probabilities, labels, count, average="micro").item(),
            "balanced_accuracy": recall.mean().item(),
            "macro_f1": f1.mean().item(),
            "auroc": auroc,
            "auprc": auprc,
            "ece": self.calibration_error(logits, labels),
        }

    def averages(
        self, hit: Tensor, claimed: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proportion of right images, recall, and F1 of the classes that occur."""
        f1 = torch.where(positive > 0, 2 * hit / (claimed + positive), torch.nan)
        return hit.sum(1) / total[:, 0], hit / positive, f1

    def calibration_error(self, logits: Tensor, labels: Tensor) -> float:
        """Expected calibration error of the most probable class."""
        probabilities, count = logits.softmax(-1), logits.shape[-1]
        return multiclass_calibration_error(probabilities, labels, count, n_bins=ECE_BINS).item()

    def reliability(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Right or not, and the probability, of the most probable class (N,)."""
        confidence, best = probabilities.max(-1)
        return best == labels, confidence

    def curves(self, num_classes: int) -> range:
        """All classes; of two, the second: the first's curve says no more."""
        return range(num_classes)[1:] if num_classes == 2 else range(num_classes)

    def describe(
        self, probabilities: Mapping[str, float], thresholds: Mapping[str, float]
    ) -> dict[str, Any]:
        """`class`, its `probability`, and `called` if any class has a threshold."""
        best = max(probabilities, key=probabilities.get)
        described = {"class": best, "probability": probabilities[best]}
        described["probabilities"] = dict(probabilities)
        if thresholds:
            called = [name for name, least in thresholds.items() if probabilities[name] >= least]
            described["called"] = called
        return described
