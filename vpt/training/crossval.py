"""Cross-validates training on the training images: it is kept where it lowers the log loss."""

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

ENOUGH = 300  # held-out images that suffice
LEARNED = 640  # images that a split learns from at most, or 6 a class
LEVEL = 0.05  # of the one-sided test that training helps

Part = tuple[np.ndarray, np.ndarray, np.ndarray]  # to learn from, to hold out, columns left out
Predict = Callable[[DataLoader], tuple[Tensor, Tensor]]  # logits and labels


def judged_parts(images: TrainingSet, folds: int) -> list[Part]:
    """The splits that are judged by, and of each the classes that it can't be judged by.

    All images of a patient are in one. They are `folds`, or fewer where only one class has as many
    images, or ENOUGH are held out: of the last split only what is missing, and if that is less than
    half of it, it is left out. A split learns from LEARNED images at most.
    """
    parts: list[Part] = []
    for seen, held in images.target.splits(images.labels, images.patients, folds):
        most = max(LEARNED, 6 * images.num_classes)
        seen = np.sort(np.random.default_rng(0).permutation(seen)[:most])
        held, unlearned = images.target.comparable(images.labels, seen, held)
        room = ENOUGH - sum(len(held) for _, held, _ in parts)
        if parts and room < len(held) / 2:
            break
        held = np.sort(np.random.default_rng(0).permutation(held)[:room])
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
    """True if training lowers the log loss of held-out images, by a one-sided t-test at LEVEL.

    Logits before and after training each have their best temperature: trained ones are
    overconfident, which one number mends, and which would hide what was learned. `model` is left as
    it was.

    Args:
        model: to train.
        images: to train on.
        parts: of `judged_parts`; each is held out in turn.
        balanced: all classes count alike, however many images they have.
        start: makes of `model` what it is before its first step on a loader's images.
        fit: trains `model` on a loader.
        predict: with `model`.
        log: takes lines for the user.
    """
    untrained = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    target = model.target
    if not parts:
        log("cross-validation: too few images a class, so nothing is trained")
        return False
    log(
        f"cross-validation: trains on {len(parts)} parts of the training images first, to see on "
        "the others whether it helps"
    )
    logits = []
    for seen, held, unlearned in parts:
        learned, test = images.part(seen, learn=True), images.part(held, learn=False)
        start(learned)
        first, truth = predict(test)
        fit(learned)
        trained, _ = predict(test)
        first[:, unlearned] = trained[:, unlearned] = 0
        model.load_state_dict(untrained, strict=False)
        logits.append((first, trained, truth))
    held = np.concatenate([held for _, held, _ in parts])
    first, trained, truth = (torch.cat(parts) for parts in zip(*logits, strict=True))
    gain = (log_losses(target, first, truth) - log_losses(target, trained, truth)).numpy()
    before, after = (100 * target.num_correct(x, truth) / len(held) for x in (first, trained))
    gain = weigh(gain, target, images, held, balanced, len(model.class_names))
    p = ttest_1samp(gain, 0, alternative="greater").pvalue if len(gain) > 1 and gain.any() else 1.0
    helps = bool(p < LEVEL)
    verdict = "trained" if helps else "left as it starts; train.folds=null trains all the same"
    log(
        f"cross-validation: of {len(held)} held-out training images {before:.1f} % right before "
        f"training, {after:.1f} % after. Chance alone lowers the log loss so much in {p:.0%} of "
        f"cases (p = {p:.2f}), and less than {LEVEL:.0%} are wanted: {verdict}"
    )
    return helps


def assign_splits(images: TrainingSet, count: int) -> np.ndarray:
    """Index (N,) of the split that holds out each image, from 0; `count` where none does."""
    numbers = np.full(len(images.labels), count)
    for split, (_, held) in enumerate(images.target.splits(images.labels, images.patients, count)):
        numbers[held] = split
    return numbers


def log_losses(target: Target, logits: Tensor, labels: Tensor) -> Tensor:
    """Log loss of each image (N,), at the temperature that is best for all."""
    scaled = logits.double() / best_temperature(target, logits, labels)
    return target.losses(scaled, labels)


def weigh(
    gains: np.ndarray,
    target: Target,
    images: TrainingSet,
    held: np.ndarray,
    balanced: bool,
    num_classes: int,
) -> np.ndarray:
    """Gains (…, M) of the images `held`, fit to be averaged and tested.

    With `balanced` weighted so that classes count alike; means over patients where these are
    known: images of one patient are not independent.
    """
    labels = images.labels[held]
    if balanced:
        present = target.truth(torch.from_numpy(labels), num_classes).numpy()
        counts = target.class_counts(labels, num_classes).clip(min=1)
        gains = gains * (len(held) * present / counts).sum(1)
    if images.patients:
        _, patient = np.unique([images.patients[i] for i in held], return_inverse=True)
        of = np.eye(patient.max() + 1)[patient]
        gains = gains @ of / of.sum(0)
    return gains
