"""Whether training makes a method better than it starts: cross-validated on the training images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import ttest_1samp
from torch import Tensor
from torch.utils.data import DataLoader

from vpt.evaluation.decision import best_temperature
from vpt.methods import Method
from vpt.progress import Log
from vpt.targets import Target
from vpt.training.training_set import TrainingSet

ENOUGH = 400  # held-out images to judge by; folds after that many are left out
LEVEL = 0.05  # of the one-sided test that training helps

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # to learn from, to hold out, columns left out
Predict = Callable[[DataLoader], tuple[Tensor, Tensor]]  # logits and labels


def judged_parts(images: TrainingSet, folds: int) -> list[Part]:
    """The splits that are judged by, and of each the classes that it can't be judged by.

    All images of a patient are in one. They are `folds`, or fewer where only one class has as many
    images, or ENOUGH are held out before.
    """
    parts: list[Part] = []
    for seen, held in images.target.splits(images.labels, images.patients, folds):
        if sum(len(held) for _, held, _ in parts) >= ENOUGH:
            break
        held, unlearned = images.target.comparable(images.labels, seen, held)
        if len(held):
            parts.append((seen, held, unlearned))
    return parts


def training_helps(
    model: Method,
    images: TrainingSet,
    parts: Sequence[Part],
    balanced: bool,
    start: Callable[[DataLoader], None],
    fit: Callable[[DataLoader], object],
    predict: Predict,
    log: Log,
) -> bool:
    """Whether held-out images are answered better after training than before it.

    Better: a lower log loss, image by image, by a t-test at LEVEL. Both have the temperature that
    suits them best, for trained answers are too sure: a fault that one number mends, and hides what
    was learned. `model` is left as it was.

    Args:
        model: to train.
        images: to train on.
        parts: of `judged_parts`; each is held out in turn.
        balanced: all classes count alike, however many images they have.
        start: makes of `model` what it is before its first step on a loader's images.
        fit: trains `model` on a loader.
        predict: with `model`.
        log: takes the figures.
    """
    untrained = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    labels, patients = images.labels, images.patients
    target = model.target
    if not parts:
        log("cross-validation: too few images a class, so nothing is trained")
        return False
    log(
        f"cross-validation: trains on {len(parts)} parts of the training images first, to see on "
        "the others whether it helps"
    )
    answers = []
    for seen, held, unlearned in parts:
        learned, test = images.part(seen, learn=True), images.part(held, learn=False)
        start(learned)
        first, truth = predict(test)
        fit(learned)
        trained, _ = predict(test)
        first[:, unlearned] = trained[:, unlearned] = 0
        model.load_state_dict(untrained, strict=False)
        answers.append((first, trained, truth))
    held = np.concatenate([held for _, held, _ in parts])
    first, trained, truth = (torch.cat(parts) for parts in zip(*answers, strict=True))
    gain = (_log_loss(target, first, truth) - _log_loss(target, trained, truth)).numpy()
    before, after = (100 * target.num_correct(x, truth) / len(held) for x in (first, trained))
    if balanced:
        present, classes = target.truth(truth, first.shape[1]).numpy(), model.class_names
        counts = target.class_counts(labels[held], len(classes)).clip(min=1)
        gain *= (len(held) * present / counts).sum(1)
    if patients:  # images of one patient are not independent
        _, patient = np.unique([patients[i] for i in held], return_inverse=True)
        gain = np.bincount(patient, gain) / np.bincount(patient)
    p = ttest_1samp(gain, 0, alternative="greater").pvalue if len(gain) > 1 and gain.any() else 1.0
    helps = bool(p < LEVEL)
    verdict = "trained" if helps else "left as it starts; train.folds=null trains all the same"
    log(
        f"cross-validation: of {len(held)} held-out training images {before:.1f} % right before "
        f"training, {after:.1f} % after. Chance alone lowers the log loss so much in {p:.0%} of "
        f"cases (p = {p:.2f}), and less than {LEVEL:.0%} are wanted: {verdict}"
    )
    return helps


def assign_folds(images: TrainingSet, folds: int) -> np.ndarray:
    """Which of `folds` holds out each image (N,), from 0; `folds` itself where none does."""
    numbers = np.full(len(images.labels), folds)
    for fold, (_, held) in enumerate(images.target.splits(images.labels, images.patients, folds)):
        numbers[held] = fold
    return numbers


def _log_loss(target: Target, logits: Tensor, labels: Tensor) -> Tensor:
    """Log loss of each image (N,), at the temperature that is best for all."""
    scaled = logits.double() / best_temperature(target, logits, labels)
    return target.losses(scaled, labels)
