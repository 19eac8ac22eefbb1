"""Whether training makes a method better than it starts: cross-validated on the training images."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.stats import ttest_1samp
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from vpt.data.images import Samples
from vpt.data.loaders import make_loader
from vpt.engine.evaluate import EVAL_BATCH, num_correct
from vpt.engine.progress import Log
from vpt.methods import Method

ENOUGH = 300  # held-out images to judge by; folds after that many are left out
LEVEL = 0.1  # of the one-sided test that training helps

Predict = Callable[[DataLoader], tuple[Tensor, Tensor]]  # logits and labels


def training_helps(
    model: Method,
    train: DataLoader,
    folds: int,
    balanced: bool,
    start: Callable[[DataLoader], None],
    fit: Callable[[DataLoader], object],
    predict: Predict,
    log: Log,
) -> bool:
    """Whether held-out images are answered better after training than before it.

    Better: a lower Brier score, image by image, by a t-test at LEVEL. `model` is left as it was.

    Args:
        model: to train.
        train: from `make_loader`. All images of a patient are in one fold.
        folds: how many, fewer where only one class has as many images; each is held out in turn
            until ENOUGH images were.
        balanced: all classes count alike, however many images they have.
        start: makes of `model` what it is before its first step on a loader's images.
        fit: trains `model` on a loader.
        predict: with `model`.
        log: takes the figures.
    """
    untrained = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    samples: Samples = train.dataset.samples
    log("cross-validation: trains on parts of the training images first")
    gains, judged, correct = [], [], torch.zeros(2)
    for seen, held in _folds(samples, folds):
        if sum(map(len, judged)) >= ENOUGH:
            break
        learned = _loader(train, samples.take(seen), learn=True)
        test = _loader(train, samples.take(held), learn=False)
        start(learned)
        first, labels = predict(test)
        fit(learned)
        trained, _ = predict(test)
        model.load_state_dict(untrained, strict=False)
        gains.append(_brier(first, labels) - _brier(trained, labels))
        judged.append(held)
        correct += torch.stack([num_correct(first, labels), num_correct(trained, labels)])
    if not gains:
        log("cross-validation: too few images a class, so nothing is trained")
        return False
    gain, images = torch.cat(gains).double().numpy(), np.concatenate(judged)
    before, after = 100 * correct / len(gain)
    if balanced:
        labels = samples.labels[images]
        gain *= len(labels) / np.bincount(labels)[labels]
    if samples.patients:  # images of one patient are not independent
        _, patient = np.unique([samples.patients[i] for i in images], return_inverse=True)
        gain = np.bincount(patient, gain) / np.bincount(patient)
    p = ttest_1samp(gain, 0, alternative="greater").pvalue if len(gain) > 1 and gain.any() else 1.0
    helps = bool(p < LEVEL)
    log(
        f"cross-validation: of {len(images)} held-out training images {before:.1f} % right before "
        f"training, {after:.1f} % after, p = {p:.2f}: {'trained' if helps else 'left as it starts'}"
    )
    return helps


def assign_folds(samples: Samples, folds: int) -> np.ndarray:
    """Which of `folds` holds out each image (N,), from 0; `folds` itself where none does."""
    numbers = np.full(len(samples), folds)
    for fold, (_, held) in enumerate(_folds(samples, folds)):
        numbers[held] = fold
    return numbers


def _folds(samples: Samples, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices to learn from and to hold out."""
    labels, patients = samples.labels, samples.patients
    units = patients or range(len(labels))
    if samples.multilabel:
        splitter, most = GroupKFold if patients else KFold, len(set(units))
    else:
        splitter = StratifiedGroupKFold if patients else StratifiedKFold
        pairs = set(zip(labels.tolist(), units, strict=True))
        most = np.sort(np.bincount([label for label, _ in pairs]))[-2:][0]
    if min(folds, most) < 2:
        return
    split = splitter(min(folds, most), shuffle=True, random_state=0).split
    with warnings.catch_warnings(action="ignore"):  # of classes that some folds lack
        parts = list(split(labels, labels, patients))
    for seen, held in parts:
        if samples.multilabel or len(np.unique(labels[seen])) > 1:
            yield seen, held


def _loader(train: DataLoader, samples: Samples, learn: bool) -> DataLoader:
    """The images of `train` that `samples` are, to learn from or to be tested on."""
    dataset = train.dataset
    return make_loader(
        samples,
        dataset.preprocess,
        train.batch_size if learn else EVAL_BATCH,
        train=learn,
        augment=dataset.augmentation if learn else "none",
        seed=dataset.seed,
        workers=train.num_workers,
    )


def _brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the probabilities (N, C) of each image: (N,)."""
    if labels.dim() == 2:
        return (logits.sigmoid() - labels).square().mean(1)
    truth = F.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) - truth).square().sum(1)
