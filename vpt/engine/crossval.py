"""Whether training makes a method better than it starts: cross-validated on the training images."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.stats import ttest_1samp
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold
from torch import Tensor
from torch.utils.data import DataLoader

from vpt.data.images import Samples
from vpt.data.loaders import ImageDataset, make_loader
from vpt.engine.evaluate import EVAL_BATCH, num_correct
from vpt.engine.progress import Log
from vpt.methods import Method

ENOUGH = 300  # held-out images to judge by; folds after that many are left out
LEVEL = 0.2  # of the one-sided test that training helps

Predict = Callable[[DataLoader], tuple[Tensor, Tensor]]  # logits and labels


def training_helps(
    model: Method,
    train: DataLoader,
    folds: int,
    start: Callable[[DataLoader], None],
    fit: Callable[[DataLoader], object],
    predict: Predict,
    log: Log,
) -> bool:
    """Whether held-out images are answered better after training than before it.

    Better: a lower Brier score, image by image, by a t-test at LEVEL. `model` is left as it was.

    Args:
        model: to train.
        train: from `make_loader`; at least `folds` images of each class, or fewer folds are made.
            All images of a patient are in one fold.
        folds: how many; each is held out in turn until ENOUGH images were.
        start: makes of `model` what it is before its first step on a loader's images.
        fit: trains `model` on a loader.
        predict: with `model`.
        log: takes the figures.
    """
    untrained = {name: tensor.clone() for name, tensor in model.artifact_tensors().items()}
    gains, correct = [], torch.zeros(2)
    dataset: ImageDataset = train.dataset
    for seen, held in _folds(dataset.samples, folds):
        if sum(map(len, gains)) >= ENOUGH:
            break
        learned, test = (
            _loader(train, dataset.samples.take(seen), True),
            _loader(train, dataset.samples.take(held), False),
        )
        start(learned)
        first, labels = predict(test)
        fit(learned)
        trained, _ = predict(test)
        model.load_state_dict(untrained, strict=False)
        gains.append(_brier(first, labels) - _brier(trained, labels))
        correct += torch.stack([num_correct(first, labels), num_correct(trained, labels)])
    if not gains:
        log("cross-validation: too few images a class, so nothing is trained")
        return False
    gain = torch.cat(gains).double().numpy()
    p = ttest_1samp(gain, 0, alternative="greater").pvalue if gain.any() else 1.0
    helps = bool(p < LEVEL)
    before, after = 100 * correct / len(gain)
    log(
        f"cross-validation: of {len(gain)} held-out training images {before:.1f} % right before "
        f"training, {after:.1f} % after, p = {p:.2f}: {'trained' if helps else 'left as it starts'}"
    )
    return helps


def _folds(samples: Samples, folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices to learn from and to hold out."""
    labels, groups = samples.labels, samples.patients
    if samples.multilabel:
        splitter, folds = KFold, min(folds, len(labels))
    else:
        splitter = StratifiedGroupKFold if groups else StratifiedKFold
        units = set(zip(labels.tolist(), groups or range(len(labels)), strict=True))
        counts = np.bincount([label for label, _ in units])
        folds = min(folds, counts[counts > 0].min())
    if folds > 1:
        yield from splitter(folds, shuffle=True, random_state=0).split(labels, labels, groups)


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
    truth = torch.nn.functional.one_hot(labels, logits.shape[1])
    return (logits.softmax(1) - truth).square().sum(1)
