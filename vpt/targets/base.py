"""A target is the kind of label an image has; nothing else knows the labels' shape."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from vpt.errors import InputError

if TYPE_CHECKING:  # data are listed, and refused, before torch is needed
    from torch import Tensor

ECE_BINS = 15
Labels: TypeAlias = "np.ndarray | Tensor"  # arrays of a data set, tensors of a batch


class Target:
    """Base of all targets. A target is one file in this package, or a class of one's own.

    N images have C classes, and a model's logits are (N, C) or (B, C).

    Attributes:
        name: the file's name; of a class outside this package, the class's.
        exclusive: True where an image is of one class: labels are class numbers (N,), and there
            are confusions, prediction sets and shots of patients.
        wording: follows the number of classes where a data set is described.
    """

    name: ClassVar[str]
    exclusive: ClassVar[bool] = False
    wording: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        package, _, module = cls.__module__.rpartition(".")
        cls.name = module if package == __package__ else cls.__name__

    # Labels of a data set

    def fits(self, labels: Labels) -> bool:
        """True if `labels` are of this kind."""
        raise NotImplementedError

    def num_classes(self, labels: np.ndarray) -> int:
        """Number of classes that `labels` need at least."""
        raise NotImplementedError

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Number of images of each class (C,)."""
        raise NotImplementedError

    def learnable(self, labels: np.ndarray) -> bool:
        """True if `labels` tell enough apart for a classifier to be fitted."""
        return True

    def reorder(self, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
        """The labels where class i of before is class `order[i]`."""
        raise NotImplementedError

    def draw(self, labels: np.ndarray, shots: int, rng: random.Random) -> list[int]:
        """Indices of random samples, `shots` of each class."""
        raise NotImplementedError

    # Cross-validation

    def splits(
        self, labels: np.ndarray, patients: Sequence[str] | None, count: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions to learn from and to hold out, for each of at most `count` splits.

        Fewer where only one class has as many images (patients), none where it would be one; a
        split whose rest is not learnable is left out. All images of a patient are in one.
        """
        splitter, most = self._splitter(labels, patients)
        if min(count, most) < 2:
            return []
        split = splitter(min(count, most), shuffle=True, random_state=0).split
        with warnings.catch_warnings(action="ignore"):  # of classes that some splits lack
            parts = list(split(labels, labels, patients))
        return [(seen, held) for seen, held in parts if self.learnable(labels[seen])]

    def _splitter(
        self, labels: np.ndarray, patients: Sequence[str] | None
    ) -> tuple[type[Any], int]:
        """A cross-validator class of scikit-learn, and the largest number of its splits."""
        raise NotImplementedError

    def comparable(
        self, labels: np.ndarray, seen: np.ndarray, held: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of `held` that test a training on `seen`, and classes to leave out of it.

        A class that is absent in `seen` has an infinite loss, so it is left out.
        """
        raise NotImplementedError

    def regressions(
        self, labels: np.ndarray, num_classes: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Logistic regressions of a linear probe: rows of the head, and class numbers (N,).

        One row has the log-odds of 1 against 0; several, those of the class numbers in order.
        """
        raise NotImplementedError

    # Logits and labels

    def blank(self, count: int, num_classes: int) -> np.ndarray:
        """Labels in the place of those that `count` images to be predicted do not have."""
        return np.zeros(count, np.int64)

    def conform(self, labels: Any, num_classes: int) -> Any:
        """Labels of a batch from anybody's loader as this target has them, if they plainly are.

        Raises:
            InputError: they are not; says their shape and range.
        """
        return labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss, a scalar."""
        return self.losses(logits, labels).mean()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of each image (N,)."""
        raise NotImplementedError

    def divergence(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the probabilities of `teacher` to those of `logits`.

        Of logits (B, C) both; divided by B · C, a scalar.
        """
        raise NotImplementedError

    def num_correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Number of right predictions, a scalar in float32."""
        raise NotImplementedError

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities (N, C)."""
        raise NotImplementedError

    def scores(self, logits: Tensor) -> Tensor:
        """Scores (N, C) by which each class ranks images."""
        return self.probabilities(logits)

    def truth(self, labels: Tensor, num_classes: int) -> Tensor:
        """Classes of each image, bool (N, C)."""
        raise NotImplementedError

    def predicted(self, logits: Tensor) -> Tensor:
        """Predicted classes, bool (N, C)."""
        raise NotImplementedError

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float | int | None]:
        """Metrics, each between 0 and 1 or None where it has no value, and `num_test`.

        At least accuracy, balanced_accuracy, macro_f1, auroc, auprc and ece, for a run's result.
        """
        found = self._metrics(logits, labels)
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}
        return {**finite, "num_test": len(labels)}

    def _metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float | None]:
        raise NotImplementedError

    def averages(
        self, hit: Tensor, claimed: Tensor, positive: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Accuracy (R,), recall and F1 of each class (R, C) in R resamples; NaN: not counted.

        Args:
            hit: true positives (R, C).
            claimed: positive predictions (R, C).
            positive: positives (R, C).
            total: images (R, 1).
        """
        raise NotImplementedError

    def calibration_error(self, logits: Tensor, labels: Tensor) -> float:
        """Expected calibration error in ECE_BINS bins."""
        raise NotImplementedError

    def reliability(self, probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Right or not, and the confidence, of each prediction that a reliability plot counts."""
        raise NotImplementedError

    def curves(self, num_classes: int) -> range:
        """Classes that have an ROC curve of their own."""
        return range(num_classes)

    def describe(
        self, probabilities: Mapping[str, float], thresholds: Mapping[str, float]
    ) -> dict[str, Any]:
        """A prediction on one image as JSON values, `probabilities` (class → value) among them.

        Classes with a threshold are called at or above it.
        """
        raise NotImplementedError

    # Class names as texts, for methods with a text tower

    def texts(self, class_names: Sequence[str]) -> list[str]:
        """Names that the text tower reads."""
        return list(class_names)

    def contrast(self, similarities: Tensor) -> Tensor:
        """Logits (…, C) from the similarities (…, texts) of an image and `texts`."""
        return similarities

    def text_truth(self, labels: Tensor, num_classes: int) -> Tensor:
        """Bool (N, texts): the `texts` that are true of each image."""
        return self.truth(labels, num_classes)


def misfit(labels: Tensor, mend: str) -> InputError:
    """The refusal of a batch's labels, which says their shape and range."""
    span = f", {labels.min():g} to {labels.max():g}" if labels.numel() else ""
    return InputError(f"labels of shape {tuple(labels.shape)}{span}: {mend}")


def as_tensor(labels: Any) -> Tensor:
    """Labels as a loader gave them: a tensor, an array, or a list of numbers.

    Raises:
        InputError: something else, such as names.
    """
    import torch

    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        kind = type(labels[0] if isinstance(labels, Sequence) and labels else labels).__name__
        raise InputError(f"labels are of type {kind}: give numbers in a tensor") from None
