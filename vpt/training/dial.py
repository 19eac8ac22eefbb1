"""Chooses how far trained prompts act: a factor on their gates, by held-out training images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from vpt.config import TrainConfig
from vpt.losses import Loss
from vpt.methods import Method
from vpt.methods.base import Batch
from vpt.methods.linear_probe import SPLITS
from vpt.progress import Log
from vpt.training import crossval
from vpt.training.crossval import Part, assign_splits, log_losses, weigh
from vpt.training.epochs import with_epochs
from vpt.training.side_by_side import SideBySide, num_batches
from vpt.training.training_set import TrainingSet

FACTORS = (0.25, 0.5, 1.0, 1.5)
FLIPS = 10_000  # draws of what chance alone gives
# of VPT-deep, see docs/recipe.md
MANY = 10  # images of each class from which on it mostly helps
LIKELY = 0.5  # the level there, in the place of `crossval.LEVEL`
FEW = 20  # images a class up to which held-out ones can't tell
HALF = 0.5  # the factor that helps there on the mean, with three classes or more


def choose_factor(
    model: Method,
    images: TrainingSet,
    parts: Sequence[Part],
    start: Batch,
    make_loss: Callable[[TrainingSet], Loss],
    config: TrainConfig,
    accelerator: Accelerator,
    tick: Callable[[], None],
    log: Log,
) -> float:
    """The factor on the gates that held-out images speak for; 0: the prompts are left as they are.

    HALF where there are three classes or more and too few images to tell, unless `model` starts
    from another's prompts. Without training, 0 if the linear probe gets no held-out image wrong, or
    so few are held out that chance could make all of them better.

    Args:
        model: which `side_by_side.fits`, before its first step.
        images: to train on.
        parts: of `judged_parts`.
        start: features of all images as of now, on the CPU.
        make_loss: of the images of a part.
        config: of the training, its epochs before `min_steps` adds to them.
        accelerator: of the training.
        tick: called for each batch.
        log: takes lines for the user.
    """
    if not parts:
        log("cross-validation: too few images a class, so nothing is trained")
        return 0.0
    sets = [
        TrainingSet(images.part(seen, learn=True), model.target, images.num_classes)
        for seen, _, _ in parts
    ]
    splits = np.full((len(parts), len(images.labels)), -1)
    for row, own, (seen, _, _) in zip(splits, sets, parts, strict=True):
        row[seen] = assign_splits(own, SPLITS)
    losses = [make_loss(own) for own in sets]
    side = SideBySide(model, start, images.read, torch.from_numpy(splits), losses, accelerator)
    held = torch.cat([torch.from_numpy(held) for _, held, _ in parts])
    part = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(h) for _, h, _ in parts]))
    labels = side.labels[held]
    needed = side.splits >= 0
    needed[part, held] = True

    def logits(factor: float) -> Tensor:
        return side.logits(needed, factor, tick)[part, held]

    def right(logits: Tensor) -> int:
        return int(model.target.num_correct(logits, labels))

    before = logits(0.0)
    wrong = len(held) - right(before)
    probe = f"cross-validation: of {len(held)} held-out training images the linear probe"
    if not wrong or 0.5 ** len(held) >= crossval.LEVEL:
        found = f"gets {wrong} wrong, too few to tell" if wrong else "gets all right"
        log(f"{probe} {found}: left as it starts; train.folds=null trains all the same")
        return 0.0
    batches = num_batches([len(seen) for seen, _, _ in parts], images.loader.batch_size)
    side.train(with_epochs(config, batches), batches, tick)
    after = [logits(factor) for factor in FACTORS]
    told = torch.stack([log_losses(model.target, each, labels) for each in (before, *after)])
    gains = told[0] - told[1:]
    balanced = losses[0].log_weights is not None
    gains = weigh(gains.numpy(), model.target, images, held.numpy(), balanced, images.num_classes)
    best, p = pick(gains)
    # processes that compute the same may still round differently
    best, p = broadcast_object_list([best, p])
    factor = FACTORS[best]
    mean = told.mean(1)
    found = (
        f"{probe} gets {len(held) - wrong} right (log loss {mean[0]:.3f}), and "
        f"{right(after[best])} ({mean[1 + best]:.3f}) with prompts at {factor:g} times the "
        "strength that they were trained at"
    )
    level, otherwise, when = _judged(model, images)
    chance = f"by chance alone they would look as good in {p:.2%} of cases"
    wanted = f"less than {level:.0%} are wanted with {when}"
    if p < level:
        log(f"{found}; {chance}, and {wanted}: trained on all images")
        return factor
    if otherwise:
        verdict = (
            "these are too few to tell, and prompts mostly help then: trained on all images, "
            f"and kept at {otherwise:g} times the strength"
        )
    else:
        verdict = "left as it starts; train.folds=null trains all the same"
    log(f"{found}; but {chance}, and {wanted}: {verdict}")
    return otherwise


def _judged(model: Method, images: TrainingSet) -> tuple[float, float, str]:
    """The p below which prompts are kept, the factor else, and of what the first is, in words."""
    who = np.array(images.patients or range(len(images.labels)))
    units = "patients" if images.patients else "images"
    counts = [len(np.unique(who[images.labels == label])) for label in np.unique(images.labels)]
    deep = len(model.layers) > 1
    bare = not model.gates.any()  # does not start from another's prompts
    few = len(counts) > 2 and np.mean(counts) <= FEW
    otherwise = HALF if deep and bare and few else 0.0
    if min(counts) < MANY:
        return crossval.LEVEL, otherwise, f"fewer than {MANY} {units} of some class"
    if not deep:
        return crossval.LEVEL, otherwise, "prompts before one block only"
    return LIKELY, otherwise, f"{MANY} {units} or more of each class"


def pick(gains: np.ndarray) -> tuple[int, float]:
    """The factor to take, and the chance of such gains where no factor helps.

    Of gains (F, M) by F factors on M images, or patients. The test flips the signs of images'
    gains, all factors' together, and compares the largest t-statistic of any: that several factors
    are tried is in p. The factor is that of the largest mean gain.
    """
    size = np.sqrt((gains**2).sum(1, keepdims=True))
    scaled = gains / np.where(size > 0, size, 1)
    best = scaled.sum(1).max()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, gains.shape[1]))
    as_good = (signs @ scaled.T).max(1) >= best - 1e-12
    p = (1 + as_good.sum()) / (1 + FLIPS)
    return int(gains.mean(1).argmax()), float(p)
