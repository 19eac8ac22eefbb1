"""Chooses how far trained prompts act: a factor on their gates, by held-out training images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vpt.methods import Method
from vpt.progress import Log
from vpt.training import crossval
from vpt.training.crossval import Part, log_losses, weigh
from vpt.training.side_by_side import SideBySide
from vpt.training.training_set import TrainingSet

FACTORS = (0.5, 1.0, 1.5, 2.0)
FLIPS = 10_000  # draws of what chance alone gives


def choose_factor(
    model: Method,
    images: TrainingSet,
    parts: Sequence[Part],
    balanced: bool,
    side: SideBySide,
    train: Callable[[], None],
    tick: Callable[[], None],
    log: Log,
) -> float:
    """The factor on the gates that held-out images speak for; 0: the prompts are left as they are.

    Without training, 0 if so few held-out images are wrong by the linear probe that by a sign test
    it could be chance to mend them all.

    Args:
        model: to train.
        images: N, to train on.
        parts: of `judged_parts`, S.
        balanced: all classes count alike, however many images they have.
        side: the S copies, as they start.
        train: trains them.
        tick: called for each batch after it.
        log: takes lines for the user.
    """
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
    if 0.5**wrong >= crossval.LEVEL:
        log(
            f"{probe} gets {wrong} wrong: too few to tell from chance whether prompts mend them; "
            "left as it starts; train.folds=null trains all the same"
        )
        return 0.0
    train()
    after = [logits(factor) for factor in FACTORS]
    gains = log_losses(model.target, before, labels) - torch.stack(
        [log_losses(model.target, each, labels) for each in after]
    )
    gains = weigh(
        gains.numpy(), model.target, images, held.numpy(), balanced, len(model.class_names)
    )
    best, p = pick(gains)
    factor = FACTORS[best]
    found = (
        f"{probe} gets {len(held) - wrong} right, and {right(after[best])} with prompts at "
        f"{factor:.0%} of their strength"
    )
    chance = f"chance alone makes them look so good in {p:.0%} of cases (p = {p:.3f})"
    if p < crossval.LEVEL:
        log(f"{found}; {chance}: trained on all images")
        return factor
    log(
        f"{found}; but {chance}, and less than {crossval.LEVEL:.0%} are wanted: left as it starts; "
        "train.folds=null trains all the same"
    )
    return 0.0


def pick(gains: np.ndarray) -> tuple[int, float]:
    """The factor to take, and the chance of such gains where no factor helps.

    Of gains (F, M) by F factors on M images, or patients. The test flips the signs of images'
    gains, all factors' together, and compares the largest t-statistic of any: that several factors
    are tried is in p. The factor is the smallest whose mean gain is within a standard error of the
    best.
    """
    size = np.sqrt((gains**2).sum(1, keepdims=True))
    scaled = gains / np.where(size > 0, size, 1)
    best = scaled.sum(1).max()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, gains.shape[1]))
    as_good = (signs @ scaled.T).max(1) >= best - 1e-12
    p = (1 + as_good.sum()) / (1 + FLIPS)
    means = gains.mean(1)
    top = means.argmax()
    behind = gains[top] - gains
    error = behind.std(1, ddof=1) / np.sqrt(gains.shape[1]) if gains.shape[1] > 1 else 0 * means
    return int(np.flatnonzero(behind.mean(1) <= error)[0]), float(p)
